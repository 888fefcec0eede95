"""One kind of judgement as another, by hand; and faults of a set of preferences that were planted."""

from __future__ import annotations

import pytest

from alignment.data.conversions import (
    labels_of_pairs,
    labels_of_ratings,
    pairs_of_labels,
    pairs_of_rankings,
    pairs_of_ratings,
)
from alignment.data.hygiene import label_hygiene, pair_hygiene
from alignment.judgements import LabelledAnswer, Ranking, RatedAnswer
from alignment.types import PreferencePair


def rated(answer, target, prompt=0):
    return RatedAnswer(id=f"{prompt}/{answer}", prompt_ids=(prompt,), answer_ids=(answer,), target=target, source="s")


def labelled(answer, target, prompt=0):
    return LabelledAnswer(id=f"{prompt}/{answer}", prompt_ids=(prompt,), answer_ids=(answer,), target=target)


def paired(chosen, rejected, prompt=0):
    return PreferencePair(
        id=f"{prompt}/{chosen}/{rejected}", prompt_ids=(prompt,), chosen_ids=chosen, rejected_ids=rejected
    )


def sides(pairs):
    return [(pair.prompt_ids[0], pair.chosen_ids[0], pair.rejected_ids[0]) for pair in pairs]


def test_a_ranking_gives_every_pair_that_does_not_tie():
    ranking = Ranking(id="r", prompt_ids=(7, 8), answer_ids=((1, 9), (2,), (3,), (4,)), ranks=(1, 2, 2, 4), source="s")
    pairs = pairs_of_rankings([ranking])
    assert [(p.chosen_ids[0], p.rejected_ids[0]) for p in pairs] == [(1, 2), (1, 3), (1, 4), (2, 4), (3, 4)]
    assert {p.prompt_ids for p in pairs} == {(7, 8)}
    assert pairs[0].chosen_ids == (1, 9)
    assert pairs[0].source == "s"
    assert len({p.id for p in pairs}) == 5


RATINGS = [rated(1, 0.9), rated(2, 0.6), rated(3, 0.2), rated(4, 1.0, prompt=5), rated(5, 0.9, prompt=5)]


def test_ratings_by_gap_and_by_threshold():
    assert sides(pairs_of_ratings(RATINGS, gap=0.3)) == [(0, 1, 3), (0, 2, 3), (0, 1, 2)]
    assert sides(pairs_of_ratings(RATINGS, gap=0.35)) == [(0, 1, 3), (0, 2, 3)]
    assert sides(pairs_of_ratings(RATINGS, gap=0.0)) == [(0, 1, 3), (0, 2, 3), (0, 1, 2), (5, 4, 5)]
    assert sides(pairs_of_ratings(RATINGS, threshold=0.6)) == [(0, 1, 3), (0, 2, 3)]
    assert sides(pairs_of_ratings(RATINGS, gap=0.0, most_per_prompt=1)) == [(0, 1, 3), (5, 4, 5)]
    close = [rated(1, 0.9), rated(2, 0.8), rated(3, 0.8)]  # 0.9 - 0.8 is less than 0.1 in floating point
    assert sides(pairs_of_ratings(close, gap=0.1)) == [(0, 1, 2), (0, 1, 3)]
    assert sides(pairs_of_ratings(close, gap=0.0)) == [(0, 1, 2), (0, 1, 3)]
    for wrong in ({}, {"gap": 0.1, "threshold": 0.5}):
        with pytest.raises(ValueError, match=r"gap, threshold: got .* expected exactly one"):
            pairs_of_ratings(RATINGS, **wrong)


def test_answers_to_different_prompts_are_never_paired():
    answers = [rated(1, 0.9, prompt=1), rated(2, 0.1, prompt=2)]
    assert pairs_of_ratings(answers, gap=0.1) == []
    assert pairs_of_labels([labelled(1, 1.0, prompt=1), labelled(2, 0.0, prompt=2)]) == []


def test_labels_of_one_prompt_are_paired():
    labels = [labelled(1, 1.0), labelled(2, 0.0), labelled(3, 0.0), labelled(4, 1.0), labelled(9, 1.0, prompt=5)]
    assert sides(pairs_of_labels(labels)) == [(0, 1, 2), (0, 1, 3), (0, 4, 2), (0, 4, 3)]
    assert len(pairs_of_labels(labels, most_per_prompt=3)) == 3
    assert pairs_of_labels([labelled(1, 1.0), labelled(1, 0.0)]) == []  # the same answer, both ways


def test_labels_of_pairs_have_each_answer_once():
    pairs = [paired((1,), (2,)), paired((1,), (3,)), paired((2,), (3,)), paired((1,), (2,), prompt=5)]
    labels = labels_of_pairs(pairs)
    assert [(label.prompt_ids[0], label.answer_ids[0], label.target) for label in labels] == [
        (0, 1, 1.0),
        (0, 2, 0.0),
        (0, 3, 0.0),
        (0, 2, 1.0),
        (5, 1, 1.0),
        (5, 2, 0.0),
    ]
    assert len({label.id for label in labels}) == 6


def test_pairs_there_and_back():
    pairs = [paired((1, 2), (3,)), paired((4,), (5, 6), prompt=2)]
    back = pairs_of_labels(labels_of_pairs(pairs))
    assert [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in back] == [
        (p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs
    ]


def test_labels_of_ratings():
    assert [label.target for label in labels_of_ratings(RATINGS, threshold=0.6)] == [1, 1, 0, 1, 1]


def test_planted_faults_of_pairs_are_found():
    pairs = [
        paired((1, 1, 1), (2,)),
        paired((1, 1, 1), (2,)),
        paired((2,), (1, 1, 1)),
        paired((4, 4), (5,)),
        paired((6,), (6,)),
        paired((1, 1, 1), (2,), prompt=9),
    ]
    found = pair_hygiene(pairs)
    assert (found.num_pairs, found.num_prompts) == (6, 2)
    assert (found.identical, found.contradictory, found.equal_answers) == (1, 1, 1)
    assert found.chosen_longer == pytest.approx(4.5 / 6)
    assert (found.chosen_tokens, found.rejected_tokens) == pytest.approx((13 / 6, 8 / 6))
    text = found.text()
    assert "identical to an earlier pair: 1 (16.7%)" in text
    assert "the longer one is chosen in 75.0%" in text
    assert "warning: longer answers win" in text


def test_clean_pairs_have_no_warning():
    found = pair_hygiene([paired((1, 2), (3,)), paired((4,), (5, 6))])
    assert (found.identical, found.contradictory, found.equal_answers, found.chosen_longer) == (0, 0, 0, 0.5)
    assert "warning" not in found.text()
    assert "identical to an earlier pair: none" in found.text()
    assert "warning: shorter answers win" in pair_hygiene([paired((1,), (3, 3))]).text()
    assert pair_hygiene([]).num_pairs == 0


def test_planted_faults_of_labels_are_found():
    labels = [labelled(1, 1.0), labelled(1, 1.0), labelled(1, 0.0), labelled(2, 0.0), labelled(2, 0.0)]
    found = label_hygiene(labels)
    assert (found.num_desirable, found.num_undesirable) == (2, 3)
    assert (found.identical, found.contradictory) == (2, 1)
    assert found.advice is not None
    assert "warning: got 2 desirable answers and 3 undesirable ones" in found.text()
    balanced = label_hygiene(labels, desirable_weight=1.5)
    assert balanced.advice is None
    assert "warning" not in balanced.text()
    assert "one class alone" in label_hygiene(labels[:2]).text()
