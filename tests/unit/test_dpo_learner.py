"""DPO on tiny models: its first step, what a batch's cut does not change, and what is learnt (P34, P35)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import write_tiny_model
from tiny_learners import gradients
from tiny_preferences import dpo_learner, loaded, objective_of, pairs_of, reference_of

from alignment.adapters import adapter_disabled
from alignment.learners.answers import answer_batch
from alignment.learners.dpo import held_out_metrics, pair_logps
from alignment.logprobs import token_logprobs
from alignment.loops.preference_stages import Judged, PairStage
from alignment.losses import dpo_loss
from alignment.packing import MicroBatchLimit
from alignment.types import PreferencePair

EVERYTHING = objective_of(
    ("sigmoid", 1.0, False), ("ipo", 0.01, True), ("orpo", 1.0, False), ("sft", 0.5, False), length_alpha=0.5
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and another model as its reference."""
    base = tmp_path_factory.mktemp("dpo")
    return write_tiny_model(base / "policy"), write_tiny_model(base / "reference", seed=1)


def test_sums_are_those_of_whole_logits(folders):
    pairs = pairs_of(5)
    model = loaded(folders[0])
    found = pair_logps(model, pairs, limit=MicroBatchLimit(rows=2))
    for pair, (chosen, rejected) in zip(pairs, found, strict=True):
        for answer, logps in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            ids = torch.tensor([pair.prompt_ids + answer])
            with torch.no_grad():
                whole = token_logprobs(model.model(input_ids=ids).logits, ids)[0]
            assert whole[len(pair.prompt_ids) :].sum().item() == pytest.approx(logps, abs=1e-4)


def test_answers_are_marked_and_nothing_else():
    ids, mask, response = answer_batch([((5, 6), (7,)), ((8,), (9, 10, 11))])
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert response.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_the_first_step_is_ln_2_and_the_second_is_not(folders):
    """P34, with a reference that was computed before the run."""
    pairs = pairs_of(6)
    learner = dpo_learner(folders[0])
    reference = reference_of(folders[0], pairs)
    told = [learner.update(pairs, reference, step=step) for step in range(2)]
    assert told[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told[0]["dpo/margin"] == pytest.approx(0, abs=1e-6)
    assert told[0]["dpo/grad_norm"] > 0.01
    assert told[1]["dpo/loss"] < math.log(2) - 1e-3
    assert told[1]["dpo/accuracy"] > 0.5


def test_a_reference_computed_before_is_that_of_the_moment(folders):
    """P35: also after updates, in another order and other micro-batches, with the adapter's base as reference."""
    pairs = pairs_of(7)
    learner = dpo_learner(folders[0], lora=True, lr=1e-2)
    before = reference_of(folders[0], pairs)
    for step in range(3):
        learner.update(pairs, before, step=step)
    own = learner.logps(pairs)
    with adapter_disabled(learner.model.model):
        now = pair_logps(learner.model, pairs[::-1], limit=MicroBatchLimit(rows=3))[::-1]
    torch.testing.assert_close(torch.tensor(now), torch.tensor(before), atol=1e-5, rtol=1e-6)
    assert (torch.tensor(own) - torch.tensor(before)).abs().max() > 0.1


@pytest.mark.parametrize("objective", [None, EVERYTHING], ids=["dpo", "terms"])
def test_the_gradient_is_that_of_the_whole_batch(folders, objective):
    pairs = pairs_of(7)
    alpha = 1.0 if objective is None else objective.length_alpha
    reference = reference_of(folders[1], pairs, length_alpha=alpha)
    found, told = [], []
    cuts = [(7, "padded", False), (3, "padded", False), (1, "padded", False), (3, "packed", False)]
    for rows, layout, share in [*cuts, (7, "padded", True), (2, "padded", True)]:
        learner = dpo_learner(folders[0], rows=rows, layout=layout, objective=objective, share_prompts=share)
        found.append(gradients(learner, lambda: told.append(learner.update(pairs, reference, step=0))))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for other in told[1:]:
        assert other == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in told[0].items()}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("sft", [0.0, 0.7])
def test_update_is_the_loss_of_plain_logits(folders, alpha, sft):
    """Loss and gradient of the learner against dpo_loss over whole logits, one sequence at a time: plainly, with the
    tokens beyond the common length weighted, and with the likelihood of all chosen tokens beside it."""
    pairs = pairs_of(5)
    reference = reference_of(folders[1], pairs, length_alpha=alpha)
    terms = ["sigmoid"] + [("sft", sft, False)] * bool(sft)
    learner = dpo_learner(folders[0], rows=2, objective=objective_of(*terms, length_alpha=alpha))
    told = []
    found = gradients(learner, lambda: told.append(learner.update(pairs, reference, step=0)))

    def tokens(model, prompt, answer):
        ids = torch.tensor([prompt + answer])
        return token_logprobs(model.model(input_ids=ids).logits, ids)[0, len(prompt) :]

    def sides(model):
        for pair in pairs:
            common = min(len(pair.chosen_ids), len(pair.rejected_ids))
            for answer in (pair.chosen_ids, pair.rejected_ids):
                row = tokens(model, pair.prompt_ids, answer)
                yield row[:common].sum() + alpha * row[common:].sum()

    model, other = loaded(folders[0]), loaded(folders[1])
    chosen, rejected = torch.stack(list(sides(model))).view(-1, 2).unbind(1)
    with torch.no_grad():
        expected_reference = torch.stack(list(sides(other))).view(-1, 2)
    torch.testing.assert_close(torch.tensor(reference), expected_reference, atol=1e-4, rtol=1e-5)
    loss, _ = dpo_loss(chosen, rejected, *expected_reference.unbind(1), beta=0.1)
    every = torch.cat([tokens(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    loss = loss - sft * every.mean()
    loss.backward()
    assert any(len(pair.chosen_ids) != len(pair.rejected_ids) for pair in pairs)
    assert told[0]["dpo/loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = [p.grad for _, p in model.named_parameters() if p.grad is not None]
    assert len(expected) == len(found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["simpo", "orpo", ("sigmoid", 1.0, True), ("ipo", 1.0, True)])
def test_means_divide_by_the_tokens_that_length_alpha_counts(kind):
    """Every token of both answers has log-probability -1: whatever the lengths, neither answer is the better one."""
    pair = PreferencePair(id="0", prompt_ids=(1,), chosen_ids=(5,) * 20, rejected_ids=(6,) * 10)
    for alpha, chosen in ((0.0, -10.0), (0.25, -12.5), (1.0, -20.0)):
        objective = objective_of(kind, length_alpha=alpha, margin=0.0)
        found = held_out_metrics(objective, [pair], [(chosen, -10.0)], [(0.0, 0.0)])
        assert found["validation/margin"] == pytest.approx(0, abs=1e-6)
        told = PairStage(objective).table([pair], *[Judged(logps=[[(chosen, -10.0)]], reference=[])] * 2, seed=0)
        assert told["likelihood_accuracy"]["after"] == 0.5


def test_the_learner_divides_by_the_tokens_that_length_alpha_counts(folders):
    """With alpha 0 tokens beyond the shorter answer's length change nothing, of the mean either."""
    pairs = pairs_of(6)
    assert any(len(pair.chosen_ids) != len(pair.rejected_ids) for pair in pairs)
    cut = []
    for pair in pairs:
        common = min(len(pair.chosen_ids), len(pair.rejected_ids))
        cut.append(
            dataclasses.replace(pair, chosen_ids=pair.chosen_ids[:common], rejected_ids=pair.rejected_ids[:common])
        )
    told = [
        dpo_learner(folders[0], objective=objective_of("simpo", beta=2.0, length_alpha=alpha)).update(
            rows, None, step=0
        )
        for rows, alpha in ((pairs, 0.0), (cut, 1.0))
    ]
    for name in ("dpo/loss", "dpo/margin", "dpo/grad_norm"):
        assert told[0][name] == pytest.approx(told[1][name], rel=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        objective_of("sigmoid"),
        objective_of("sigmoid", length_alpha=0.5),
        objective_of(("ipo", 1.0, True)),
        objective_of("simpo", beta=2.0),
        objective_of("orpo", "sft", beta=0.5),
    ],
    ids=["dpo", "ld-dpo", "ipo", "simpo", "orpo"],
)
def test_a_planted_preference_is_learnt_and_holds_for_others(folders, objective):
    pairs = pairs_of(48)
    train, held_out = pairs[:32], pairs[32:]
    learner = dpo_learner(folders[0], rows=8, lr=3e-3, objective=objective)
    alpha = objective.length_alpha
    ref_train, ref_out = (
        reference_of(folders[0], part, length_alpha=alpha) if objective.uses_reference else None
        for part in (train, held_out)
    )
    before = held_out_metrics(objective, held_out, learner.logps(held_out), ref_out)
    for step in range(24):
        rows = [(8 * step + i) % len(train) for i in range(8)]
        batch = [train[i] for i in rows]
        learner.update(batch, None if ref_train is None else [ref_train[i] for i in rows], step=step)
    after = held_out_metrics(objective, held_out, learner.logps(held_out), ref_out)
    assert after["validation/accuracy"] >= 0.9
    assert after["validation/loss"] < before["validation/loss"]
    assert after["validation/margin"] > before["validation/margin"]


def test_prompts_are_shared_with_an_adapter_too(folders):
    pairs = pairs_of(5)
    apart, shared = (dpo_learner(folders[0], lora=True, lr=1e-2, share_prompts=share) for share in (False, True))
    reference = reference_of(folders[0], pairs)
    for learner in (apart, shared):
        for step in range(2):
            learner.update(pairs, reference, step=step)
    found, expected = (torch.tensor(learner.logps(pairs)) for learner in (shared, apart))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert (expected - torch.tensor(reference)).abs().max() > 0.1


def test_a_model_with_a_limited_view_does_not_share_prompts(tmp_path):
    folder = write_tiny_model(tmp_path, "mistral", sliding_window=4)
    with pytest.raises(ValueError, match="share_prompts: got True with a model"):
        dpo_learner(folder, share_prompts=True)


def test_a_reference_that_is_missing_or_of_others_is_refused(folders):
    learner, pairs = dpo_learner(folders[0]), pairs_of(3)
    with pytest.raises(ValueError, match="ref_logps: got none for 3 pairs"):
        learner.update(pairs, None, step=0)
    with pytest.raises(ValueError, match="ref_logps: got 2 for 3 pairs"):
        learner.update(pairs, [(0.0, 0.0)] * 2, step=0)
