"""The supervised learner: its loss in closed form, and what must not change it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import write_tiny_model
from tiny_sft import examples_of
from torch.nn.functional import cross_entropy

from alignment import adapters, models
from alignment.batching import sft_batch
from alignment.engines.torch import TorchEngine
from alignment.forward import response_logprobs
from alignment.learners.sft import SftLearner, embedding_noise
from alignment.losses import sft_loss
from alignment.packing import MicroBatchLimit


def learner_of(folder, *, rows=4, tokens=None, layout="padded", lora=False, lr=1e-3, **settings):
    model = models.load_causal_lm(str(folder), layout=layout)
    if lora:
        adapters.attach_lora(model.model, r=4, alpha=8, seed=1)
    engine = TorchEngine(model.named_parameters(), lr=lr, total_updates=20, max_grad_norm=1e9)
    limit = MicroBatchLimit(rows=rows, tokens=tokens, layout=model.layout)
    return SftLearner(model, engine, micro_batch_limit=limit, **settings)


def weights(learner):
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def gradients(learner, examples, step=0):
    learner.engine.step = lambda **_: {}
    metrics = learner.update(examples, step=step)
    return metrics, {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}


def test_loss_is_the_mean_cross_entropy_of_trained_tokens(tiny):
    """Against torch's own cross-entropy, each sequence alone, without padding."""
    learner, examples = learner_of(tiny / "policy"), examples_of(7)
    model = models.load_causal_lm(str(tiny / "policy")).model
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.input_ids])
            labels = torch.where(torch.tensor(example.response_mask), ids[0], -100)
            total += float(cross_entropy(model(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum"))
            count += sum(example.response_mask)
    metrics = learner.update(examples, step=0)
    assert metrics["sft/loss"] == pytest.approx(total / count, rel=1e-6)
    assert (metrics["sft/trained_tokens"], metrics["sft/tokens"]) == (count, sum(len(e.input_ids) for e in examples))


def test_golden_loss_and_gradient():
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -4.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    loss, metrics = sft_loss(logprobs, mask)
    loss.backward()
    assert loss.item() == metrics["loss"].item() == pytest.approx(7 / 3)
    assert torch.equal(logprobs.grad, torch.where(mask, torch.tensor(-1 / 3), torch.tensor(0.0)))
    assert sft_loss(logprobs.detach(), mask, denominator=7)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "split",
    [{"rows": 1}, {"rows": 3}, {"rows": None, "tokens": 60}, {"rows": 5, "layout": "packed"}],
    ids=["one by one", "threes", "token budget", "packed"],
)
def test_micro_batches_change_no_gradient(tiny, split):
    examples = examples_of(9)
    whole, expected = gradients(learner_of(tiny / "policy", rows=9), examples)
    metrics, seen = gradients(learner_of(tiny / "policy", **split), examples)
    assert metrics["sft/loss"] == pytest.approx(whole["sft/loss"], rel=1e-6)
    assert expected.keys() == seen.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_neighbour_in_a_packed_row_changes_nothing_to_the_last_bit(tiny):
    """Sample A in front of B, then another A of the same length: B's log-probabilities keep their bits."""
    model = models.load_causal_lm(str(tiny / "policy"), layout="packed")
    longest, a, b = examples_of(30, longest=40)[0:3]
    longest = dataclasses.replace(longest, input_ids=(7,) * 60, response_mask=(True,) * 60)
    other = dataclasses.replace(a, input_ids=tuple(reversed(a.input_ids)))
    assert len(a.input_ids) + len(b.input_ids) <= 60  # so both lie in one row
    rows = []
    for first in (a, other):
        ids, mask, response = sft_batch([longest, first, b])
        rows.append(response_logprobs(model, ids, mask, response, temperature=1.0)[0])
    assert not torch.equal(rows[0][1], rows[1][1])
    assert torch.equal(rows[0][2], rows[1][2])


def test_untrained_tokens_and_padding_move_nothing(tiny):
    """The gradient of the embedding row of a token that only stands where nothing is learnt from it is not needed to
    be zero, but what the mask leaves out must not be a target: another last, untrained token changes nothing."""
    (example,) = examples_of(1, seed=3)
    ids, mask = list(example.input_ids), list(example.response_mask)
    longer = [dataclasses.replace(example, input_ids=(*ids, last), response_mask=(*mask, False)) for last in (11, 150)]
    losses = [learner_of(tiny / "policy").nll([e])[0] for e in [example, *longer]]
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_nll_is_in_the_order_given_and_adds_up_to_the_loss(tiny):
    learner, examples = learner_of(tiny / "policy", rows=2), examples_of(7)
    sums = learner.nll(examples)
    assert sums == pytest.approx([learner.nll([e])[0] for e in examples], rel=1e-5)
    loss = learner.update(examples, step=0)["sft/loss"]
    assert sum(sums) / sum(e.num_trained for e in examples) == pytest.approx(loss, rel=1e-5)


def test_noise_is_uniform_of_the_size_of_the_paper_and_an_examples_own():
    """Its bound is alpha / sqrt(L d), its variance a third of the bound's square."""
    examples = examples_of(5, longest=200)
    noise = embedding_noise(examples, 64, alpha=5.0, seed=1, step=3)
    for row, example in zip(noise, examples, strict=True):
        length = len(example.input_ids)
        bound = 5.0 / math.sqrt(length * 64)
        assert bound * 0.98 < float(row[:length].abs().max()) <= bound
        assert float(row[:length].var()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert not row[length:].any()
        alone = embedding_noise([example], 64, alpha=5.0, seed=1, step=3)
        assert torch.equal(alone[0], row[:length])
    assert not torch.equal(noise, embedding_noise(examples, 64, alpha=5.0, seed=1, step=4))
    assert not torch.equal(noise, embedding_noise(examples, 64, alpha=5.0, seed=2, step=3))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_noise_reaches_the_embeddings_and_depends_on_no_split(tiny, layout):
    """Gradients with noise: unlike those without, alike for every cut and layout; validation has none."""
    examples = examples_of(6)
    _, plain = gradients(learner_of(tiny / "policy", rows=6), examples)
    _, whole = gradients(learner_of(tiny / "policy", rows=6, neftune_alpha=5.0), examples)
    _, cut = gradients(learner_of(tiny / "policy", rows=2, layout=layout, neftune_alpha=5.0), examples)
    name = "model.model.layers.0.mlp.up_proj.weight"
    assert float((plain[name] - whole[name]).norm() / plain[name].norm()) > 0.01
    for key, gradient in whole.items():
        torch.testing.assert_close(cut[key], gradient, rtol=1e-4, atol=1e-6)
    clean = learner_of(tiny / "policy").nll(examples)
    assert learner_of(tiny / "policy", neftune_alpha=5.0).nll(examples) == clean


def test_noise_is_added_to_what_the_embedding_gives(tiny):
    """A hidden state with noise is that of a model whose embeddings were moved by hand."""
    model = models.load_causal_lm(str(tiny / "policy"))
    ids, mask = torch.tensor([[5, 9, 30, 7]]), torch.ones(1, 4, dtype=torch.bool)
    noise = 0.1 * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = model.model.get_input_embeddings()(ids) + noise
        expected = model.model.base_model(inputs_embeds=embedded).last_hidden_state
        torch.testing.assert_close(model.hidden(ids, mask, noise), expected)
        assert float((model.hidden(ids, mask) - expected).abs().max()) > 0.01


@pytest.mark.parametrize("lora", [False, True])
def test_training_lowers_the_loss_and_resumes_to_the_last_bit(tiny, lora):
    batches = [examples_of(8, seed=step % 2) for step in range(10)]
    whole = learner_of(tiny / "policy", lora=lora, neftune_alpha=1.0)
    losses = [whole.update(batch, step=step)["sft/loss"] for step, batch in enumerate(batches)]
    assert losses[-1] < losses[1] - 0.1
    first = learner_of(tiny / "policy", lora=lora, neftune_alpha=1.0)
    for step in range(4):
        first.update(batches[step], step=step)
    second = learner_of(tiny / "policy", lora=lora, neftune_alpha=1.0)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(4, 10):
        second.update(batches[step], step=step)
    expected = weights(whole)
    assert all(torch.equal(p, expected[name]) for name, p in weights(second).items())


class Pull:
    """A method with a penalty: half the squared norm of one matrix, and a record of when it was asked."""

    def __init__(self, parameter):
        self.parameter, self.calls = parameter, []

    def begin_update(self, update):
        self.calls.append(("begin", update))

    def penalty(self):
        return 0.5 * self.parameter.square().sum()

    def end_update(self, update):
        self.calls.append(("end", update, self.parameter.grad is not None))

    def metrics(self):
        return {"pull": 1.0}

    def state_dict(self):
        return {"calls": len(self.calls)}

    def load_state_dict(self, state):
        self.calls = [None] * state["calls"]


def test_a_methods_penalty_counts_once_whatever_the_micro_batches(tiny):
    """The gradient of half a squared norm is the matrix itself."""
    examples = examples_of(8)
    _, plain = gradients(learner_of(tiny / "policy"), examples)
    name = "model.model.layers.1.mlp.down_proj.weight"
    for rows in (1, 8):
        learner = learner_of(tiny / "policy", rows=rows)
        parameter = dict(learner.model.named_parameters())[name]
        learner.method = Pull(parameter)
        metrics, seen = gradients(learner, examples)
        torch.testing.assert_close(seen[name] - plain[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert metrics["pull"] == 1.0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_learned_and_rotary_positions_count_real_tokens_only(tmp_path, kind, layout):
    """An example's loss in a batch of other lengths is its loss alone (where padding shifted positions it is not)."""
    write_tiny_model(tmp_path, kind)
    learner, examples = learner_of(tmp_path, rows=6, layout=layout), examples_of(6, longest=60)
    together = learner.nll(examples)
    assert together == pytest.approx([learner.nll([e])[0] for e in examples], rel=1e-5)


def test_attention_implementations_give_the_same_loss_and_gradients(tiny):
    """SDPA and eager attention, padded and packed."""
    examples, found = examples_of(6, longest=60), []
    for attention, layout in (("eager", "padded"), ("sdpa", "padded"), ("sdpa", "packed")):
        model = models.load_causal_lm(str(tiny / "policy"), attention=attention, layout=layout)
        engine = TorchEngine(model.named_parameters(), lr=1e-3, total_updates=20, max_grad_norm=1e9)
        limit = MicroBatchLimit(rows=6, layout=model.layout)
        found.append(gradients(SftLearner(model, engine, micro_batch_limit=limit), examples))
    (metrics, expected), *others = found
    for other, seen in others:
        assert other["sft/loss"] == pytest.approx(metrics["sft/loss"], rel=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
