"""Packed forwards are padded forwards: same numbers, same gradients, and no sequence sees another."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import byte_tokenizer, write_tiny_model
from tiny_learners import rollouts_of
from torch import nn
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig, MistralConfig

from alignment import adapters, forward, models
from alignment.engines.torch import TorchEngine
from alignment.learners.ppo import PolicyLearner
from alignment.packed import packed_hidden, packing_errors, saves_tokens
from alignment.packing import MicroBatchLimit, computed_tokens

LENGTHS = (23, 4, 9, 12, 7, 3)
LAYOUTS = ("packed", "one_row")


def batch_of(lengths=LENGTHS, *, width=None, left=False, garbage=0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), garbage)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    response = torch.zeros_like(mask)
    for i, n in enumerate(lengths):
        start = width - n if left else 0
        ids[i, start : start + n] = torch.randint(3, 200, (n,), generator=generator)
        mask[i, start : start + n] = True
        response[i, start + 2 : start + n] = True
    return ids, mask, response


def causal(folder, layout, **settings):
    model = models.load_causal_lm(str(folder), **settings)
    model.layout = layout
    return model


def logprobs_and_gradients(model, batch):
    """Log-probabilities and entropies of the responses, and the gradients of an uneven sum of both."""
    ids, mask, response = batch
    logprobs, entropy = forward.response_logprobs(model, ids, mask, response, temperature=0.8, with_entropy=True)
    weights = torch.linspace(-1, 1, int(response.sum()))
    model.zero_grad()
    ((logprobs + 0.1 * entropy)[response] * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach()[response], entropy.detach()[response], gradients


def assert_close(ours, theirs):
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_and_gradients_are_those_of_the_padded_forward(any_model_folder, layout, attention):
    batch = batch_of()
    padded = logprobs_and_gradients(causal(any_model_folder, "padded", attention=attention), batch)
    assert_close(logprobs_and_gradients(causal(any_model_folder, layout, attention=attention), batch), padded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("garbage", [0, 2, 10**6])
def test_side_width_and_content_of_the_padding_change_nothing(tiny, layout, garbage):
    expected = logprobs_and_gradients(causal(tiny / "policy", "padded"), batch_of())
    for left in (False, True):
        batch = batch_of(width=31, left=left, garbage=garbage)
        assert_close(logprobs_and_gradients(causal(tiny / "policy", layout), batch), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_and_gradient_checkpointing(tiny, layout):
    def prepared(layout):
        model = causal(tiny / "policy", layout)
        adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        models.enable_gradient_checkpointing(model)
        return model

    padded, packed = (logprobs_and_gradients(prepared(kind), batch_of()) for kind in ("padded", layout))
    assert all("lora_" in name for name in packed[2])
    assert_close(packed, padded)
    plain = logprobs_and_gradients(causal(tiny / "policy", "padded"), batch_of())
    assert (packed[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_scores_are_those_of_the_padded_forward(tiny, layout):
    model = models.load_scalar_model(str(tiny / "policy"), head="random", seed=5)
    for left in (False, True):
        ids, mask, _ = batch_of(width=31, left=left)
        # A value speaks of the state before its token: the first token's has none, and what padding holds is nobody's.
        reads = mask & mask.roll(1, 1)
        reads[:, 0] = False
        found = []
        for kind in ("padded", layout):
            model.layout = kind
            model.zero_grad()
            values, scores = forward.response_values(model, ids, mask), forward.sequence_scores(model, ids, mask)
            (values[reads].square().sum() + scores.exp().sum()).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.append((values.detach()[reads], scores.detach(), gradients))
        assert_close(found[1], found[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_sequence_changes_not_a_bit(any_model_folder, layout, attention):
    """Each sequence in turn is replaced; in one row with it, the others' log-probabilities and gradients stay."""
    model = causal(any_model_folder, layout, attention=attention)
    ids, mask, response = batch_of()
    for changed in range(len(ids)):
        other = ids.clone()
        other[changed] = batch_of(seed=8)[0][changed]
        rest = torch.arange(len(ids)) != changed
        found = []
        for tokens in (ids, other):
            embeddings = []
            hook = model.model.get_input_embeddings().register_forward_hook(lambda _, __, out: embeddings.append(out))  # noqa: B023
            logprobs = forward.response_logprobs(model, tokens, mask, response, temperature=1.0)[0]
            hook.remove()
            # How the other sequences' loss depends on the changed one's tokens: not at all.
            (gradient,) = torch.autograd.grad(logprobs[rest].sum(), embeddings[0])
            found.append((logprobs.detach(), gradient))
        assert torch.equal(found[0][0][rest], found[1][0][rest])
        assert not torch.equal(found[0][0][changed], found[1][0][changed])
        still = (found[0][1].abs().sum(-1) == 0).sum()
        assert still >= LENGTHS[changed]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_tokens_are_computed_and_no_sequence_is_cut(tiny, layout):
    model = causal(tiny / "policy", layout)
    shapes = []
    model.model.base_model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    ids, mask, _ = batch_of()
    model.hidden(ids, mask)
    assert tuple(shapes[0]) == {"packed": (3, 23), "one_row": (1, 58)}[layout]
    assert shapes[0].numel() == computed_tokens(LENGTHS, layout)


def test_where_nothing_is_saved_rows_stay_as_they_are(tiny):
    ids, mask, _ = batch_of((9, 9, 8))
    assert not saves_tokens(mask, "packed")
    assert saves_tokens(mask, "one_row")
    assert not saves_tokens(torch.zeros(2, 5, dtype=torch.bool), "packed")
    padded, packed = (causal(tiny / "policy", layout).hidden(ids, mask) for layout in ("padded", "packed"))
    assert torch.equal(padded, packed)


def test_a_row_without_a_token_is_zeros(tiny):
    model = causal(tiny / "policy", "packed")
    ids, mask, _ = batch_of((6, 3, 2))
    expected = model.hidden(ids, mask)
    more = torch.cat([ids, ids[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])
    hidden = model.hidden(*more)
    assert torch.equal(hidden[:3], expected)
    assert (hidden[3] == 0).all()


def test_a_window_stays_a_window(tmp_path):
    """Mistral's sliding attention counts positions within a sequence, packed or not."""
    folder = write_tiny_model(tmp_path, "mistral", sliding_window=4)
    assert MistralConfig.from_pretrained(folder).sliding_window == 4
    padded = logprobs_and_gradients(causal(folder, "padded"), batch_of())
    assert_close(logprobs_and_gradients(causal(folder, "packed"), batch_of()), padded)
    wide = write_tiny_model(tmp_path / "wide", "mistral", sliding_window=400)
    assert (logprobs_and_gradients(causal(wide, "packed"), batch_of())[0] - padded[0]).abs().max() > 1e-3


RECURRENT = {
    "mamba": MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2),
    "lfm2": Lfm2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_an_architecture_that_carries_a_state_along_the_row_is_refused(tmp_path, kind):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(RECURRENT[kind]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.batch_layout: got packed with .* share a row, .* set it to auto"):
        models.load_causal_lm(str(tmp_path), layout="packed", attention="eager")
    assert models.load_causal_lm(str(tmp_path), layout="auto", attention="eager").layout == "padded"


def test_the_layout_is_the_one_that_was_asked_for(any_model_folder):
    assert models.load_causal_lm(str(any_model_folder)).layout == "padded"
    for layout in ("auto", "packed"):
        assert models.load_causal_lm(str(any_model_folder), layout=layout).layout == "packed"
        assert models.load_scalar_model(str(any_model_folder), head="zeros", layout=layout).layout == "packed"


def test_a_leak_is_measured():
    """A backbone of one leaky layer: the running mean of embeddings along the row, whoever they belong to."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)

        def forward(self, input_ids, **_):
            states = self.embedding(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1).unsqueeze(-1)
            return type("Output", (), {"last_hidden_state": states})()

    torch.manual_seed(0)
    assert min(packing_errors(Leaky(), "packed", vocab_size=50, device=torch.device("cpu"))) > 0.3


def test_a_position_from_the_row_is_measured():
    """A backbone that ignores the positions it is given: nobody sees anybody, yet the numbers are others."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)

        def forward(self, input_ids, **_):
            states = self.embedding(input_ids) + torch.arange(input_ids.shape[1]).unsqueeze(-1) / 10
            return type("Output", (), {"last_hidden_state": states})()

    torch.manual_seed(0)
    seen, changed = packing_errors(Counting(), "packed", vocab_size=50, device=torch.device("cpu"))
    assert seen == 0
    assert changed > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_learner_that_packs_takes_the_same_step(tiny, layout):
    rollouts = rollouts_of(12, seed=2)
    start = models.load_causal_lm(str(tiny / "policy"))
    found = []
    for kind in ("padded", layout):
        inner = copy.deepcopy(start.model)
        model = models.HfModel(inner, inner.get_output_embeddings(), kind)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20)
        limit = MicroBatchLimit(tokens=40, layout=kind)
        learner = PolicyLearner(model, engine, minibatch_size=12, micro_batch_limit=limit)
        found.append(learner.logprobs(rollouts))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_states_of_a_packed_row_go_back_to_their_places():
    """A backbone whose state is the token and its position."""

    def backbone(input_ids, position_ids, **_):
        return type("Output", (), {"last_hidden_state": torch.stack([input_ids, position_ids], -1).float()})()

    ids, mask, _ = batch_of(width=26, left=True, garbage=-7)
    for layout in LAYOUTS:
        states = packed_hidden(backbone, ids, mask, layout)
        expected = torch.stack([ids, (mask.long().cumsum(1) - 1)], -1) * mask.unsqueeze(-1)
        assert torch.equal(states, expected.float())
