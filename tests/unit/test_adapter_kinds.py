"""What every kind of adapter owes: an unchanged base, learning, storage, resuming, and merging where it can."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from adapter_runs import (
    IDS,
    MERGED,
    SETTINGS,
    VIRTUAL,
    attached,
    engine_of,
    hidden,
    logits,
    move,
    moved,
    named,
    train,
    write_model,
)
from tiny import write_tiny_model, write_tiny_reward_model

from actors.loading import load_trained, save_trained
from alignment import adapters, forward, models
from alignment.learners.base import load_method, method_state

KINDS = tuple(SETTINGS)
SEPARATE = tuple(kind for kind in KINDS if kind != "half")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("kinds") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("kinds") / "llama")


@pytest.mark.parametrize("kind", SEPARATE)
def test_off_it_is_the_base_and_on_it_is_not(folder, kind):
    base = hidden(models.load_causal_lm(str(folder)))
    model = moved(folder, kind)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert (hidden(model) - base).abs().max() > 1e-2
    with adapters.adapter_disabled(model.model):
        off = hidden(model)
    # Pissa's base is put together again from its parts.
    torch.testing.assert_close(off, base, rtol=1e-5, atol=1e-5 if kind == "pissa" else 0)
    assert (hidden(model) - base).abs().max() > 1e-2
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize("kind", MERGED)
def test_merged_weights_compute_what_the_adapter_does(folder, kind, tmp_path):
    model = moved(folder, kind)
    expected = logits(model)
    base = models.load_causal_lm(str(folder))
    received = copy.deepcopy(base)
    sent = dict(adapters.merged_weights(model.model))
    assert {name: tensor.nbytes for name, tensor in sent.items()} == adapters.merged_sizes(model.model)
    missing, unknown = received.model.load_state_dict(sent, strict=False)
    assert not unknown
    assert missing  # embeddings and norms are the base's
    torch.testing.assert_close(logits(received), expected, rtol=1e-5, atol=1e-5)
    adapters.export_merged(model.model, tmp_path / "merged")
    torch.testing.assert_close(logits(models.load_causal_lm(str(tmp_path / "merged"))), expected, rtol=1e-5, atol=1e-5)
    assert (logits(base) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in SEPARATE if kind != "bottleneck"])
def test_plain_peft_loads_what_was_saved(folder, kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = moved(folder, kind)
    adapters.export_adapter(model.model, tmp_path, base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing and unknown names
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = IDS[:1]
    with torch.no_grad():
        theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        ours = model.head(model.hidden(ids, torch.ones_like(ids)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


class Trained:
    """What `save_trained` takes of a learner."""

    def __init__(self, engine, method) -> None:
        self.engine, self.method = engine, method

    def state_dict(self):
        return {"engine": self.engine.state_dict(), **method_state(self.method)}

    def load_state_dict(self, state):
        self.engine.load_state_dict(state["engine"])
        load_method(self.method, state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(llama, kind, tmp_path):
    ends = []
    for stop in (None, 9):
        model, method = attached(llama, kind)
        learner = Trained(engine_of(model), method)
        train(model, learner.engine, method, stop or 20)
        if stop:
            save_trained(model, learner, tmp_path / "saved", base=str(llama))
            model, method = attached(llama, kind)
            learner = Trained(engine_of(model), method)
            move(model)  # whatever is not loaded shows
            load_trained(model, learner, tmp_path / "saved")
            train(model, learner.engine, method, 20 - stop)
        ends.append((named(model), method_state(method)))
    (one, state), (other, resumed) = ends
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert str(state) == str(resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_updates_lower_the_loss_and_move_only_what_is_meant(folder, kind):
    model, method = attached(folder, kind, total_updates=30)
    before, base = named(model), set(named(models.load_causal_lm(str(folder))))
    losses = train(model, engine_of(model, total_updates=30), method, 30)
    after = named(model)
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    if kind != "half":
        assert not {name.replace(".base_layer.", ".") for name in changed} & base
        assert {name for name, p in model.named_parameters() if p.requires_grad} >= changed


@pytest.mark.parametrize("kind", ["bottleneck", *VIRTUAL])
def test_what_cannot_be_merged_says_so(llama, kind, tmp_path):
    model = moved(llama, kind)
    for refuse in (
        lambda: adapters.export_merged(model.model, tmp_path / "merged"),
        lambda: adapters.merged_sizes(model.model),
        lambda: list(adapters.merged_weights(model.model)),
    ):
        with pytest.raises(ValueError, match=r"adapter.type: got .* to be merged .* expected one of lora.*; write"):
            refuse()
    assert not adapters.mergeable(kind)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", SEPARATE)
def test_another_shape_is_not_loaded(llama, kind, tmp_path):
    adapters.save_adapter(moved(llama, kind).model, tmp_path, base="base")
    other = {"num_tokens": 3} if kind in VIRTUAL else {"last_layers": 1}
    with pytest.raises(ValueError, match="resume with the adapter settings"):
        adapters.load_adapter(moved(llama, kind, **other).model, tmp_path)


@pytest.mark.parametrize("kind", SEPARATE)
def test_a_scalar_head_is_trained_beside_it(tmp_path, kind):
    folder = write_tiny_reward_model(tmp_path / "reward")
    model, _ = attached(folder, kind, load=models.load_scalar_model)
    assert model.model.score.weight.requires_grad
    forward.sequence_scores(model, IDS, torch.ones_like(IDS)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_bfloat16_models_learn_with_every_kind(llama):
    for kind in KINDS:
        model, method = attached(
            llama, kind, load=lambda path: models.load_causal_lm(path, dtype=torch.bfloat16), total_updates=30
        )
        losses = train(model, engine_of(model, total_updates=30), method, 30)
        assert losses[-1] < 0.95 * losses[0], kind
        if kind in MERGED:
            assert {t.dtype for _, t in adapters.merged_weights(model.model)} == {torch.bfloat16}


def test_bottlenecks_are_described_where_they_lie(llama, tmp_path):
    adapters.save_adapter(moved(llama, "bottleneck").model, tmp_path, base="base")
    described = json.loads((tmp_path / "bottleneck.json").read_text())
    assert described == {"type": "bottleneck", "r": 4, "activation": "gelu", "base": "base"}
