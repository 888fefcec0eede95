"""Sequences as a tree of tokens: what they begin with in common once, and the states of each as if it were alone."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import write_tiny_reward_model

from rewards.last_states import pad, padded_states, pays, takes_trees, tree_states
from rewards.layouts import PaddedRows, SharedPrefixes, batch_tokens, common_length, tree
from rewards.scalar_model import ScalarModel

SEQUENCES = [[1, 2, 3, 4], [1, 2, 5], [9], [1, 2, 3, 4], [1, 2, 3], [1, 2, 5, 6, 7]]


def test_a_tree_holds_every_beginning_once_and_gives_each_sequence_back():
    ids, positions, paths = tree(SEQUENCES)
    assert len(ids) == len({tuple(s[: i + 1]) for s in SEQUENCES for i in range(len(s))}) == 8
    for sequence, path in zip(SEQUENCES, paths, strict=True):
        assert [ids[node] for node in path] == sequence
        assert [positions[node] for node in path] == list(range(len(sequence)))


def test_tokens_counted_are_tokens_computed():
    draw = random.Random(0)
    for _ in range(50):
        sequences = [[draw.randrange(2) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 12))]
        shared, padded = SharedPrefixes(), PaddedRows()
        assert batch_tokens(shared, sorted(sequences, key=shared.order)) == len(tree(sequences)[0])
        assert batch_tokens(padded, sorted(sequences, key=padded.order)) == pad(sequences)[0].numel()


def test_common_length():
    pairs = [([], [1]), ([1, 2], [1, 2]), ([1, 2], [1, 2, 3]), ([1, 2, 9, 4], [1, 2, 3, 4]), ([5], [6])]
    assert [common_length(one, other) for one, other in pairs] == [0, 2, 2, 2, 0]


def grouped(draw: random.Random, vocabulary: int) -> list[list[int]]:
    """Three questions after one system prompt, with one to four answers each; one of them empty, one given twice."""
    system = [draw.randrange(vocabulary) for _ in range(7)]
    questions = [system + [draw.randrange(vocabulary) for _ in range(n)] for n in (3, 11, 5)]
    answers = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 20))] for _ in range(6)]
    return [questions[i] + answer for i, answer in zip([0, 1, 1, 2, 1, 0], answers, strict=True)] + [
        questions[2],
        questions[0] + answers[0],
    ]


def test_states_are_those_of_each_sequence_alone(tiny):
    model = ScalarModel(str(tiny / "reward"))._model
    sequences = grouped(random.Random(1), 259)
    alone = torch.cat([padded_states(model, *pad([ids])) for ids in sequences])
    assert torch.allclose(tree_states(model, sequences), alone, atol=2e-5)
    assert len(alone.unique(dim=0)) == len(sequences) - 1


def test_trees_are_for_what_begins_alike_and_for_rows_of_many_lengths():
    assert pays([[1] * 60 + [i] * 20 for i in range(8)], 576)
    assert pays([[i] * 10 for i in range(8)] + [[9] * 100], 576)
    assert not pays([[i] * 100 for i in range(8)], 576)
    assert not pays([[1] * 100], 576)


@pytest.fixture
def model(tmp_path):
    return ScalarModel(str(write_tiny_reward_model(tmp_path / "model")))._model


def test_a_model_that_attends_takes_trees_and_one_that_looks_back_a_limited_way_does_not(model):
    assert takes_trees(model)
    model.config.sliding_window = 4
    assert not takes_trees(model)


def test_layers_that_look_along_the_row_are_found(model):
    """Each layer adds a tenth of the state before it, as a convolution would: in a tree, another answer's."""
    layer = model.base_model.layers[0]
    layer.register_forward_hook(lambda _, __, out: out + 0.1 * out.roll(1, dims=1))
    assert not takes_trees(model)


def test_positions_that_are_read_from_the_row_are_found(model):
    def count(_, args, kwargs):
        columns = torch.arange(kwargs["input_ids"].shape[1]).unsqueeze(0)
        return args, kwargs | {"position_ids": columns.expand_as(kwargs["input_ids"])}

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    assert not takes_trees(model)
