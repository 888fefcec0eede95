"""KTO and BCO on tiny models: mismatched answers, the baseline of the global batch, what no cut changes (P36)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import write_tiny_model
from tiny_judgements import GOOD, WORST
from tiny_learners import gradients
from tiny_preferences import feedback_learner, feedback_update, labels_of, loaded, reference_of

from alignment.label_losses import RewardShift
from alignment.learners.answers import answer_logps
from alignment.learners.kto import BcoLearner, KtoLearner, mismatched
from alignment.logprobs import token_logprobs
from alignment.losses import kto_loss
from alignment.packing import MicroBatchLimit

KINDS = [KtoLearner, BcoLearner]
WEIGHTS = {"desirable_weight": 1.2, "undesirable_weight": 0.7}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and another model as its reference."""
    base = tmp_path_factory.mktemp("kto")
    return write_tiny_model(base / "policy"), write_tiny_model(base / "reference", seed=1)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_no_record_meets_its_own_answer(count):
    records = labels_of(count)
    others = mismatched(records)
    assert [other.prompt_ids for other in others] == [record.prompt_ids for record in records]
    assert sorted(other.answer_ids for other in others) == sorted(record.answer_ids for record in records)
    assert all(other.answer_ids != record.answer_ids for other, record in zip(others, records, strict=True))


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ("abcd", [1, 2, 3, 0]),
        ("aabb", [2, 3, 0, 1]),  # neighbours of one prompt, as held-out rows are in a file's order
        ("abab", [1, 0, 3, 2]),
        ("aaabbc", [3, 4, 5, 0, 1, 2]),
        ("aab", [2, 2, 1]),  # more than half: b's answer comes again
        ("aaaab", [4, 4, 4, 4, 3]),
        ("aaa", [1, 2, 0]),
    ],
)
def test_answers_meet_other_prompts_where_there_are_some(prompts, partners):
    records = [
        dataclasses.replace(record, id=str(i), prompt_ids=(ord(prompt), 1), answer_ids=(50 + i,))
        for i, (prompt, record) in enumerate(zip(prompts, labels_of(len(prompts)), strict=True))
    ]
    others = mismatched(records)
    assert [other.answer_ids[0] - 50 for other in others] == partners
    assert [other.prompt_ids for other in others] == [record.prompt_ids for record in records]
    prompt_of = {record.answer_ids: record.prompt_ids for record in records}
    own = [prompt_of[other.answer_ids] == other.prompt_ids for other in others]
    assert sum(own) == (len(prompts) if len(set(prompts)) == 1 else 0)


def test_an_answer_alone_meets_no_other(folders):
    with pytest.raises(ValueError, match="batch_size: got 1 labelled answers, expected two at least"):
        mismatched(labels_of(1))
    learner = feedback_learner(KtoLearner, folders[0])
    with pytest.raises(ValueError, match="batch_size: got 1"):
        learner.update(labels_of(1), [0.0], [0.0], step=0)


def test_a_reference_of_others_is_refused(folders):
    learner, records = feedback_learner(KtoLearner, folders[0]), labels_of(3)
    with pytest.raises(ValueError, match="ref_logps: got 2 for 3 answers"):
        learner.update(records, [0.0] * 2, [0.0] * 3, step=0)
    with pytest.raises(ValueError, match="ref_logps: got 4 for 3 answers"):
        learner.update(records, [0.0] * 3, [0.0] * 4, step=0)


def test_the_first_step_is_half_of_every_weight(folders):
    records = labels_of(8)
    good = sum(record.target == 1 for record in records)
    assert 0 < good < 8
    told = feedback_update(feedback_learner(KtoLearner, folders[0], **WEIGHTS), folders[0], records)
    assert told["kto/loss"] == pytest.approx((1.2 * good + 0.7 * (8 - good)) / 16, abs=1e-5)
    assert told["kto/kl"] == pytest.approx(0, abs=1e-4)
    assert told["kto/grad_norm"] > 0.01


def test_update_is_the_loss_of_plain_logits(folders):
    """Loss, baseline and gradient against kto_loss over whole logits, one sequence at a time, with a baseline that is
    not 0: the mismatched answers' log-ratio of two models."""
    records = labels_of(7)
    model, reference = loaded(folders[0]), loaded(folders[1])

    def logps(of, record):
        ids = torch.tensor([record.prompt_ids + record.answer_ids])
        return token_logprobs(of.model(input_ids=ids).logits, ids)[0, len(record.prompt_ids) :].sum()

    answers = [record.answer_ids for record in records]
    rotated = [
        dataclasses.replace(record, answer_ids=answer)
        for record, answer in zip(records, [*answers[1:], answers[0]], strict=True)
    ]
    with torch.no_grad():
        gaps = [float(logps(model, other) - logps(reference, other)) for other in rotated]
    learner = feedback_learner(KtoLearner, folders[0], rows=3, **WEIGHTS)
    ref, ref_others = (reference_of(folders[1], part) for part in (records, mismatched(records)))
    if sum(gaps) < 0:  # a baseline above 0, whichever model is the more certain
        ref_others = [value - 50.0 for value in ref_others]
        gaps = [gap + 50.0 for gap in gaps]
    told = []
    found = gradients(learner, lambda: told.append(learner.update(records, ref, ref_others, step=0)))
    own = torch.stack([logps(model, record) for record in records])
    good = torch.tensor([record.target == 1 for record in records])
    loss, _ = kto_loss(own, torch.tensor(ref), good, sum(gaps) / 7, beta=0.1, **WEIGHTS)
    loss.backward()
    assert told[0]["kto/kl"] == pytest.approx(sum(gaps) / 7, rel=1e-4)
    assert told[0]["kto/kl"] > 1
    assert told[0]["kto/loss"] == pytest.approx(loss.item(), rel=1e-4)
    rewards = 0.1 * (own.detach() - torch.tensor(ref))
    assert told[0]["kto/rewards/desirable"] == pytest.approx(rewards[good].mean().item(), rel=1e-4)
    assert told[0]["kto/rewards/undesirable"] == pytest.approx(rewards[~good].mean().item(), rel=1e-4)
    expected = [p.grad for _, p in model.named_parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [7, 2])
def test_the_gradient_is_that_of_the_whole_batch(folders, kind, count):
    records = labels_of(count)
    found, told = [], []
    cuts = [(7, "padded", False), (3, "padded", False), (1, "padded", False), (3, "packed", False)]
    for rows, layout, share in [*cuts, (7, "padded", True), (2, "packed", True)]:
        learner = feedback_learner(kind, folders[0], rows=rows, layout=layout, share_prompts=share, **WEIGHTS)
        # The reference gives everything less, so that the baseline is well above 0.
        found.append(gradients(learner, lambda: told.append(update_far(learner, folders[0], records))))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for other in told[1:]:
        assert other == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in told[0].items()}
    if kind is KtoLearner:
        assert told[0]["kto/kl"] == pytest.approx(3, abs=1e-3)


def update_far(learner, folder, records):
    """An update beside a reference that gives every answer 3 nats less than `folder`'s model."""
    ref = [value - 3 for value in reference_of(folder, records)]
    if isinstance(learner, BcoLearner):
        return learner.update(records, ref, step=0)
    return learner.update(records, ref, [value - 3 for value in reference_of(folder, mismatched(records))], step=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", [1.0, 0.0])
def test_a_batch_of_one_class_teaches_it(folders, kind, label):
    records = [dataclasses.replace(record, target=label) for record in labels_of(3)]
    learner = feedback_learner(kind, folders[0], rows=1, lr=3e-3)
    rewards = []
    name = f"{'kto' if kind is KtoLearner else 'bco'}/rewards/{'desirable' if label else 'undesirable'}"
    for step in range(3):
        told = feedback_update(learner, folders[0], records, step=step)
        assert all(abs(value) < 1e6 for value in told.values())
        rewards.append(told[name])
    assert (rewards[-1] > 0.01) if label else (rewards[-1] < -0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_label_is_learnt_and_holds_for_others(folders, kind):
    """What is held out is asked with either end, so that nothing but the end tells the answers apart."""
    records = labels_of(56)
    train, held_out = records[:40], records[40:]
    good, bad = (
        [dataclasses.replace(record, answer_ids=(*record.answer_ids[:-1], end)) for record in held_out]
        for end in (GOOD, WORST)
    )
    learner = feedback_learner(kind, folders[0], rows=8, lr=3e-3)
    before = [torch.tensor(reference_of(folders[0], side)) for side in (good, bad)]
    for step in range(30):
        batch = [train[(8 * step + i) % len(train)] for i in range(8)]
        feedback_update(learner, folders[0], batch, step=step)
    gained = [torch.tensor(learner.logps(side)) - base for side, base in zip((good, bad), before, strict=True)]
    assert (gained[0] > gained[1]).all()
    assert (gained[0] - gained[1]).mean() > 1


def test_the_reward_shift_follows_the_steps_before_and_is_saved(folders):
    records = labels_of(8)
    learner = feedback_learner(BcoLearner, folders[0], lr=1e-2, shift_decay=0.5)
    first, second = (feedback_update(learner, folders[1], records, step=step) for step in range(2))
    half = (first["bco/rewards/desirable"] + first["bco/rewards/undesirable"]) / 2
    assert first["bco/reward_shift"] == 0
    assert abs(half) > 0.01
    assert second["bco/reward_shift"] == pytest.approx(half, rel=1e-5)
    both = (second["bco/rewards/desirable"] + second["bco/rewards/undesirable"]) / 2
    assert learner.shift.value == pytest.approx((half + both) / 2, rel=1e-5)
    again = feedback_learner(BcoLearner, folders[0], lr=1e-2, shift_decay=0.5)
    again.load_state_dict(learner.state_dict())
    assert again.shift == learner.shift


def test_a_batch_whose_step_is_skipped_moves_no_shift(folders):
    records = labels_of(8)
    learner = feedback_learner(BcoLearner, folders[0], lr=1e-2)
    feedback_update(learner, folders[1], records)
    before = learner.shift.value
    broken = [float("nan"), *reference_of(folders[1], records)[1:]]
    told = learner.update(records, broken, step=1)
    assert told["bco/skipped_count"] == 1
    assert learner.shift.value == before
    again = feedback_update(learner, folders[1], records, step=2)
    assert again["bco/skipped_count"] == 0
    assert again["bco/reward_shift"] == pytest.approx(before)
    assert math.isfinite(again["bco/loss"])


def test_a_mean_that_is_not_finite_moves_no_shift():
    shift = RewardShift(decay=0.5)
    shift.update(desirable=2.0, undesirable=float("-inf"))
    assert shift.value == 2.0
    shift.update(desirable=float("nan"), undesirable=1.0)
    assert shift.value == 1.5


def test_logps_depend_on_nobody_else_in_the_batch(folders):
    records = labels_of(6)
    model = loaded(folders[0])
    answers = [(record.prompt_ids, record.answer_ids) for record in records]
    expected = torch.tensor([answer_logps(model, [answer], limit=MicroBatchLimit(rows=1))[0] for answer in answers])
    for rows, layout in ((6, "padded"), (4, "packed")):
        limit = MicroBatchLimit(rows=rows, layout=layout)
        found = answer_logps(loaded(folders[0], layout=layout), answers, limit=limit)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-6)


def test_a_prompt_is_computed_once_for_an_answer_and_the_mismatched_one(folders):
    """The same numbers, of about half of the tokens: prompts begin alike and have two answers each."""
    begin = tuple(range(20, 40))
    records = [dataclasses.replace(record, prompt_ids=begin + record.prompt_ids) for record in labels_of(6)]
    model, both = loaded(folders[0]), [*records, *mismatched(records)]
    answers = [(record.prompt_ids, record.answer_ids) for record in both]
    backbone, computed = model.model.base_model, []
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    limit = MicroBatchLimit(tokens=4096, layout="one_row")
    apart, shared = (answer_logps(model, answers, limit=limit, share_prompts=share) for share in (False, True))
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(apart), atol=1e-4, rtol=1e-5)
    once = len(begin) + sum(len(r.prompt_ids) - len(begin) + 2 * len(r.answer_ids) for r in records)
    assert computed[-1] == once + len(begin)  # in two rows: attention weighs more in a model this narrow
    assert computed[-1] < 0.5 * computed[0]


def test_prompts_are_not_shared_where_a_model_has_a_limited_view(tmp_path):
    folder = write_tiny_model(tmp_path, "mistral", sliding_window=4)
    with pytest.raises(ValueError, match="share_prompts: got True with a model"):
        feedback_learner(KtoLearner, folder, share_prompts=True)
