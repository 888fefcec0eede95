"""Numbers on disk: asked for once, told apart by what they are made of, made again when they are damaged (P35)."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_preferences import pairs_of

from alignment.reference_cache import cached_numbers

MADE_OF = {"model": "abc", "length_alpha": "1.0"}


class Counting:
    """A reference that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, pairs):
        self.asked.append([pair.id for pair in pairs])
        return [(-float(len(pair.chosen_ids)), -0.1 * len(pair.rejected_ids)) for pair in pairs]


@pytest.fixture
def pairs():
    return pairs_of(5)


def test_they_are_computed_once_and_are_the_same_afterwards(tmp_path, pairs):
    reference = Counting()
    first, told = cached_numbers(tmp_path, MADE_OF, [*pairs, pairs[0]], reference)
    again, told_again = cached_numbers(tmp_path, MADE_OF, [*pairs, pairs[0]], reference)
    assert [len(asked) for asked in reference.asked] == [5], "records of the same tokens are asked for once"
    assert first(pairs[::-1]) == again(pairs[::-1])
    assert first(pairs[:1]) == [[-float(len(pairs[0].chosen_ids)), -0.1 * len(pairs[0].rejected_ids)]]
    assert "5 records computed" in told
    assert "5 records out of" in told_again
    assert len(list(tmp_path.iterdir())) == 1


def test_another_model_setting_or_record_has_a_file_of_its_own(tmp_path, pairs):
    reference = Counting()
    cached_numbers(tmp_path, MADE_OF, pairs, reference)
    cached_numbers(tmp_path, {**MADE_OF, "model": "abd"}, pairs, reference)
    cached_numbers(tmp_path, {**MADE_OF, "length_alpha": "0.5"}, pairs, reference)
    longer = dataclasses.replace(pairs[0], chosen_ids=(*pairs[0].chosen_ids, 3))
    cached_numbers(tmp_path, MADE_OF, [longer, *pairs[1:]], reference)
    # The same tokens with another end of the prompt: another number.
    prompt, chosen = pairs[0].prompt_ids, pairs[0].chosen_ids
    shifted = dataclasses.replace(
        pairs[0],
        prompt_ids=prompt[:-1],
        chosen_ids=(prompt[-1], *chosen),
        rejected_ids=(prompt[-1], *pairs[0].rejected_ids),
    )
    cached_numbers(tmp_path, MADE_OF, [shifted, *pairs[1:]], reference)
    assert len(reference.asked) == len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "changed", "fewer", "another"])
def test_a_damaged_file_is_made_again(tmp_path, pairs, damage):
    reference = Counting()
    numbers, _ = cached_numbers(tmp_path, MADE_OF, pairs, reference)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    saved = json.loads(text)
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "changed":
        saved["numbers"][2][0] += 0.5
        path.write_text(json.dumps(saved))
    elif damage == "fewer":
        path.write_text(json.dumps({**saved, "numbers": saved["numbers"][:-1]}))
    else:
        path.write_text(json.dumps({**saved, "name": "0" * 64}))
    mended, told = cached_numbers(tmp_path, MADE_OF, pairs, reference)
    assert len(reference.asked) == 2
    assert "was damaged" in told
    assert mended(pairs) == numbers(pairs)
    assert path.read_text() == text


def test_a_record_that_was_not_asked_for_is_not_made_up(tmp_path, pairs):
    numbers, _ = cached_numbers(tmp_path, MADE_OF, pairs[:2], Counting())
    with pytest.raises(KeyError):
        numbers(pairs[2:])
