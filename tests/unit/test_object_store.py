"""What travels between processes arrives as it was sent."""

from __future__ import annotations

import pickle
import random
from dataclasses import fields

import pytest
import torch

from actors.object_store import Ragged, packed
from alignment.distributed import balanced_parts
from alignment.types import Experience


def experience(rows: int = 3, length: int = 5) -> Experience:
    draw = torch.Generator().manual_seed(0)
    kinds = {"input_ids": torch.int64, "attention_mask": torch.bool, "response_mask": torch.bool}
    return Experience(
        **{
            f.name: (4 * torch.randn(rows, length, generator=draw)).to(kinds.get(f.name, torch.float32))
            for f in fields(Experience)
        }
    )


def test_an_experience_is_the_same_after_a_journey_and_travels_beside_the_pickle():
    sent, buffers = experience(), []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == len(fields(Experience)), "every tensor is lent, none is copied into the pickle"
    assert sum(len(buffer.raw()) for buffer in buffers) == 3 * 5 * (8 + 1 + 1 + 7 * 4)
    got = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])  # noqa: S301
    for f in fields(Experience):
        assert getattr(got, f.name).dtype == getattr(sent, f.name).dtype
        assert torch.equal(getattr(got, f.name), getattr(sent, f.name))
    assert torch.equal(got.rows(torch.tensor([2, 0])).returns, sent.rows(torch.tensor([2, 0])).returns)


def test_rows_of_an_answer_travel_as_one_array():
    rows = [torch.arange(n, dtype=torch.float32) + n for n in (3, 0, 5)]
    sent = packed((rows, {"loss": 1.0}))
    assert isinstance(sent[0], Ragged)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert [len(buffer.raw()) for buffer in buffers] == [8 * 4]
    lent = bytearray(buffers[0].raw())
    got, metrics = pickle.loads(data, buffers=[lent])  # noqa: S301
    assert type(got) is list
    assert metrics == {"loss": 1.0}
    assert all(torch.equal(a, b) for a, b in zip(got, rows, strict=True))
    got[2] += 1
    assert lent == bytes(buffers[0].raw()), "what is lent is not written to"


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [torch.zeros(3)],
        [torch.zeros(3), torch.zeros(3, dtype=torch.float64)],
        [torch.zeros(3), torch.zeros(1, 3)],
        [torch.zeros(3), 1.0],
        [1.0, 2.0],
        {"a": 1},
        None,
    ],
)
def test_any_other_answer_is_left_as_it_is(answer):
    assert packed(answer) is answer


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_parts_are_those_of_the_plain_rule(parts):
    """The rule, word for word: the part with the fewest tokens, then the fewest sequences, then the first."""
    draw = random.Random(parts)
    for count in (0, 1, 5, 100):
        lengths = [draw.choice([0, 1, 1, 2, 17, 90]) for _ in range(count)]
        shares: list[list[int]] = [[] for _ in range(parts)]
        tokens = [0] * parts
        for i in sorted(range(count), key=lambda i: (-lengths[i], i)):
            least = min(range(parts), key=lambda part: (tokens[part], len(shares[part]), part))
            shares[least].append(i)
            tokens[least] += lengths[i]
        assert balanced_parts(lengths, parts) == [sorted(share) for share in shares]
