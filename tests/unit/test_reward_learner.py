"""Every objective on tiny models: what is learnt, what a score does not depend on, and runs that are cut."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_judgements import GOOD, WORST, Data, RewardRun, judgements_of, reward_learner
from tiny_learners import gradients
from tiny_runs import cut_and_resumed

from alignment.batching import marked_batch
from alignment.ensembles import score_ensemble
from alignment.forward import marked_scores, sequence_scores
from alignment.judgements import KINDS, Ranking, RatedAnswer
from alignment.learners.reward_model import score_sequences
from alignment.loops.offline import rows_for_step, take_best
from alignment.loops.reward_report import record_report
from alignment.packing import MicroBatchLimit
from alignment.reward_objectives import Objectives, held_out_loss


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def accuracy(learner, records):
    return record_report(records, learner.scores(records))["accuracy"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("pairs", {}),
        ("rankings", {}),
        ("rankings", {"ranking": "plackett_luce"}),
        ("ratings", {}),
        ("ratings", {"rating": "squared", "weigh_agreement": True}),
        ("labels", {}),
        ("steps", {}),
    ],
)
def test_a_planted_preference_is_learnt_and_holds_for_others(tiny, kind, settings):
    records = judgements_of(kind, 80)
    train, held_out = records[:56], records[56:]
    learner = reward_learner(tiny / "policy", **settings)
    objectives = learner.objectives
    # What lies in the middle is neither right nor wrong.
    held_out = [record for record in held_out if getattr(record, "target", None) != 0.5]
    before = held_out_loss(objectives, held_out, learner.scores(held_out))
    for step in range(50):
        learner.update(rows_for_step(train, step, batch_size=8, seed=0), step=step)
    after = held_out_loss(objectives, held_out, learner.scores(held_out))
    assert accuracy(learner, held_out) >= 0.9
    assert after["validation/loss"] < 0.7 * before["validation/loss"]


def test_ratings_are_met_in_their_middle_too(tiny):
    """Three levels of rating, so that a score has more to say than yes or no."""
    records = judgements_of("ratings", 80)
    learner = reward_learner(tiny / "policy")
    for step in range(80):
        learner.update(rows_for_step(records[:56], step, batch_size=8, seed=0), step=step)
    held_out = records[56:]
    probabilities = torch.tensor([row[0] for row in learner.scores(held_out)]).sigmoid()
    targets = torch.tensor([record.target for record in held_out])
    assert (probabilities - targets).abs().mean() < 0.12
    middle = targets == 0.5
    assert 0.25 < probabilities[middle].mean() < 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_whole_batch(tiny, kind):
    records = judgements_of(kind, 7)
    settings = {"center_coef": 0.01, "weigh_agreement": True}
    found, told = [], []
    for rows in (7, 3, 1):
        learner = reward_learner(tiny / "policy", rows=rows, **settings)
        found.append(gradients(learner, lambda: told.append(learner.update(records, step=0))))  # noqa: B023
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for other in told[1:]:
        assert other == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in told[0].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_update_is_that_of_its_scores(tiny, kind):
    records = judgements_of(kind, 6)
    learner = reward_learner(tiny / "policy", rows=2, center_coef=0.01, weigh_agreement=True)
    expected = held_out_loss(learner.objectives, records, learner.scores(records))
    told = learner.update(records, step=0)
    assert told["reward_model/loss"] == pytest.approx(expected["validation/loss"], rel=1e-4)
    assert told["reward_model/accuracy"] == pytest.approx(expected["validation/accuracy"], rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_nobody_else_in_the_batch(tiny, kind, layout):
    records = judgements_of(kind, 8)
    eight = reward_learner(tiny / "policy", rows=8, layout=layout).scores(records)
    one = reward_learner(tiny / "policy", rows=1, layout="padded").scores(records)
    alone = [reward_learner(tiny / "policy").scores([record])[0] for record in records]
    reverse = reward_learner(tiny / "policy", rows=3, layout=layout).scores(records[::-1])[::-1]
    assert [len(row) for row in eight] == [sum(map(len, record.reads)) for record in records]
    for other in (one, alone, reverse):
        torch.testing.assert_close(torch.tensor(sum(other, ())), torch.tensor(sum(eight, ())), rtol=0, atol=1e-5)


def test_the_last_attended_token_is_read_whichever_side_is_padded(tiny):
    records = judgements_of("labels", 5)
    learner = reward_learner(tiny / "policy")
    sequences = [record.sequences[0] for record in records]
    expected = torch.tensor([row[0] for row in learner.scores(records)])
    longest = max(map(len, sequences)) + 3
    for side in ("left", "right"):
        ids = torch.full((5, longest), 7)
        mask = torch.zeros(5, longest, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            place = slice(longest - len(sequence), None) if side == "left" else slice(0, len(sequence))
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = True
        with torch.no_grad():
            torch.testing.assert_close(sequence_scores(learner.model, ids, mask), expected, rtol=0, atol=1e-5)
    hosted = score_sequences(learner.model, sequences, limit=MicroBatchLimit(rows=2))
    assert hosted == pytest.approx(expected.tolist(), abs=1e-5)


def test_steps_are_read_where_they_end_and_see_nothing_behind(tiny):
    """The score of a step is that of the answer cut after it."""
    learner = reward_learner(tiny / "policy")
    record = next(r for r in judgements_of("steps", 6) if len(r.targets) == 3)
    (scores,) = learner.scores([record])
    (sequence,) = record.sequences
    ends = [len(record.prompt_ids) + end for end in record.step_ends]
    assert [sequence[end] for end in ends] == [GOOD if target else WORST for target in record.targets]
    cut = score_sequences(learner.model, [sequence[: end + 1] for end in ends], limit=MicroBatchLimit(rows=1))
    assert scores == pytest.approx(cut, abs=1e-5)
    with torch.no_grad():
        marked = marked_scores(learner.model, *marked_batch([sequence], record.reads))
    assert marked.tolist() == pytest.approx(list(scores), abs=1e-5)


def test_a_member_scores_the_same_alone_and_in_an_ensemble(tiny):
    records = judgements_of("labels", 6)
    first, second = reward_learner(tiny / "policy"), reward_learner(tiny / "policy")
    for step in range(3):
        second.update(records, step=step)
    members = [[row[0] for row in learner.scores(records)] for learner in (first, second)]
    assert members[0] != members[1]
    assert score_ensemble(members[:1]).scores == pytest.approx(members[0], abs=1e-5)
    both = score_ensemble(members)
    assert both.disagreement == pytest.approx([abs(a - b) / 2 for a, b in zip(*members, strict=True)], rel=1e-6)


def test_a_margin_and_an_agreement_count(tiny):
    from dataclasses import replace

    pairs = judgements_of("pairs", 4)
    wide = [replace(pair, margin=2.0) for pair in pairs]
    scores = [(1.0, 0.0)] * 4
    assert held_out_loss(Objectives(), pairs, scores)["validation/loss"] == pytest.approx(0.3132617, abs=1e-6)
    assert held_out_loss(Objectives(), wide, scores)["validation/loss"] == pytest.approx(1.3132617, abs=1e-6)

    def rated(target, agreement):
        return RatedAnswer(id="r", prompt_ids=(1,), answer_ids=(2,), target=target, agreement=agreement)

    torn = [rated(1.0, 1.0), rated(0.0, 0.5)]
    loss = held_out_loss(Objectives(weigh_agreement=True), torn, [(2.0,), (2.0,)])["validation/loss"]
    assert loss == pytest.approx((0.1269280 + 0.5 * 2.1269280) / 1.5, abs=1e-6)


def test_a_ranking_with_ties_is_refused_for_plackett_luce():
    tied = Ranking(id="tied", prompt_ids=(1,), answer_ids=((2,), (3,), (4,)), ranks=(1, 2, 2))
    Objectives().check([tied])
    with pytest.raises(ValueError, match=r"training\.ranking_loss: got plackett_luce with 1 rankings that have ties"):
        Objectives(ranking="plackett_luce").check([tied])


@pytest.mark.parametrize("adapter", [{}, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["rankings", "ratings"])
def test_a_run_that_was_cut_goes_on_to_the_same_end(tiny, tmp_path, kind, adapter):
    data = Data(judgements_of(kind, 10), judgements_of(kind, 6, seed=8))
    settings = {"run": {"num_steps": 9}, "validate_every": 3, "optimizer": {"lr": 3e-3}, "adapter": adapter}
    whole = RewardRun(tiny / "policy", tmp_path / "whole", data, **settings)
    cut = RewardRun(tiny / "policy", tmp_path / "cut", data, **settings)
    again = RewardRun(tiny / "policy", tmp_path / "cut", data, **settings)
    rows = cut_and_resumed(whole, cut, again, at=6)
    validated = [any(name.startswith("validation/") for name in row) for row in rows]
    assert validated == [step % 3 == 2 for step in range(9)]


def test_the_best_step_is_kept_and_taken(tiny, tmp_path):
    """Labels that are noise: the training rows are learnt by heart, at the cost of all others."""
    from dataclasses import replace

    noise = [replace(record, target=float(i % 2)) for i, record in enumerate(judgements_of("labels", 6))]
    data = Data(noise, [replace(r, target=float(i % 2)) for i, r in enumerate(judgements_of("labels", 12, seed=3))])
    optimizer = {"lr": 5e-3, "decay": "constant", "warmup_ratio": 0.0}
    made = RewardRun(
        tiny / "policy", tmp_path / "run", data, run={"num_steps": 40}, validate_every=1, optimizer=optimizer
    )
    with made.stack:
        made.train(patience=3)
        state = made.state
        losses = {row["step"] + 1: row["validation/loss"] for row in made.metrics()}
        assert state.best_step == min(losses, key=losses.get)
        assert state.step == state.best_step + 3 < 40
        assert take_best(made.role, made.run, state, part="reward_model") == state.best_step
        scores = made.role.scores(data.held_out).result()
        assert held_out_loss(Objectives(), data.held_out, scores)["validation/loss"] == state.best_loss
