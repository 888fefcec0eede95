"""How a step's sequences are shared out: arithmetic alone, no process."""

from __future__ import annotations

import random

import pytest

from actors.dispatch import make_shares
from alignment.types import Prompt


def prompts_of(*lengths: int) -> list[Prompt]:
    return [Prompt(id=str(i), messages=(), prompt_ids=(7,) * length) for i, length in enumerate(lengths)]


def sequences(share) -> list[tuple[str, int]]:
    return [(prompt.id, index) for prompt, index in zip(share.prompts, share.samples["sample_indices"], strict=True)]


def test_one_engine_is_asked_as_if_it_were_alone():
    prompts = prompts_of(3, 9, 5)
    (share,) = make_shares(prompts, 4, num_engines=1, sequences=2, max_new_tokens=8)
    assert share.prompts == prompts
    assert share.samples == {"num_samples": 4}
    assert list(share.positions) == list(range(12))


def test_nothing_to_do_is_no_share():
    assert make_shares([], 4, num_engines=1, sequences=2, max_new_tokens=8) == []
    assert make_shares([], 4, num_engines=3, sequences=2, max_new_tokens=8) == []


@pytest.mark.parametrize("num_engines", [2, 3, 5])
@pytest.mark.parametrize("limit", [4, 16, 1000])
@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_every_sequence_is_in_one_share_and_in_its_place(num_engines, limit, count):
    draw = random.Random(count)
    prompts = prompts_of(*(draw.randint(1, 200) for _ in range(count)))
    shares = make_shares(prompts, 3, num_engines=num_engines, sequences=limit, max_new_tokens=32)
    placed = {
        position: job for share in shares for position, job in zip(share.positions, sequences(share), strict=True)
    }
    assert [placed[i] for i in range(3 * count)] == [(str(p), k) for p in range(count) for k in range(3)]
    assert sum(len(share.positions) for share in shares) == 3 * count
    assert max(len(share.positions) for share in shares) <= limit
    # As many for each engine as keep a share within the limit, none of them a small rest.
    assert len(shares) == min(3 * count, num_engines * -(-3 * count // (num_engines * limit)))


def test_the_longest_go_first_and_neighbours_in_length_together():
    shares = make_shares(prompts_of(*range(1, 41)), 1, num_engines=2, sequences=8, max_new_tokens=4)
    lengths = [[len(prompt.prompt_ids) for prompt in share.prompts] for share in shares]
    assert [length for share in lengths for length in share] == list(range(40, 0, -1))


def test_shares_have_about_the_same_number_of_tokens():
    """Half of the prompts are nine times as long: equal counts would give one engine 1.6 times the work."""
    shares = make_shares(prompts_of(*[180] * 20, *[20] * 20), 1, num_engines=2, sequences=64, max_new_tokens=60)
    assert [len(share.positions) for share in shares] == [13, 27]
    first, second = (share.tokens for share in shares)
    assert first + second == 40 * 60 + 20 * 200
    assert abs(first - second) < 240


def test_sequences_that_just_fit_into_one_share_each_make_no_other():
    shares = make_shares(prompts_of(*[180] * 20, *[20] * 20), 1, num_engines=2, sequences=20, max_new_tokens=60)
    assert [len(share.positions) for share in shares] == [20, 20]
