"""Supervised updates by several ranks, on real processes over gloo: those of one process."""

from __future__ import annotations

import pytest
import torch
from engine_runs import on_processes
from sft_ranks import updates
from tiny import write_tiny_model

from alignment.distributed import Alone

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "policy"
    write_tiny_model(folder, tie_word_embeddings=True)
    return str(folder)


@pytest.mark.parametrize(
    ("size", "engines"),
    [
        (3, ["ddp", "zero 2"]),
        pytest.param(2, ["ddp", "zero 2"], marks=pytest.mark.slow),
        pytest.param(2, ["fsdp2", "zero 3"], marks=pytest.mark.slow),
    ],
)
def test_ranks_make_the_updates_of_one_process(policy, tmp_path, size, engines):
    """Full, LoRA and with noise: every metric of five steps within 1e-5, packed rows and ranks without any."""
    one = updates(Alone(), policy, ["ddp"])
    first, *others = on_processes(size, "sft_ranks.updates", policy, engines, folder=tmp_path / "ranks")
    assert len(first) == 3 * len(engines)
    for case, ours in first.items():
        theirs = one["ddp, " + case.rpartition(", ")[2]]
        for row, expected in zip(ours["rows"], theirs["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-5), case
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5, abs=1e-4), case
        for name, weight in theirs["weights"].items():
            torch.testing.assert_close(
                torch.tensor(ours["weights"][name]), torch.tensor(weight), atol=5e-5, rtol=0, msg=f"{case}: {name}"
            )
        for other in others:
            assert (other[case]["rows"], other[case]["weights"]) == (ours["rows"], ours["weights"]), case
