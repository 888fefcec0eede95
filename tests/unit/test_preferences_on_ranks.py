"""Updates from pairs and from labels by several ranks, on real processes over gloo: those of one process (P36)."""

from __future__ import annotations

import pytest
import torch
from engine_runs import on_processes
from preference_ranks import updates
from tiny import write_tiny_model

from alignment.distributed import Alone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("preferences")
    policy = write_tiny_model(base / "policy", tie_word_embeddings=True)
    return str(policy), str(write_tiny_model(base / "reference", seed=1))


@pytest.mark.parametrize(
    ("size", "engines"),
    [
        (3, ["ddp"]),
        pytest.param(2, ["fsdp2"], marks=pytest.mark.slow),
        pytest.param(2, ["zero 2", "zero 3"], marks=pytest.mark.slow),
    ],
)
def test_ranks_make_the_updates_of_one_process(folders, tmp_path, size, engines):
    """Every metric of four steps, the baseline among them, and the weights: packed rows, and ranks without any."""
    if any(engine.startswith("zero") for engine in engines):
        pytest.importorskip("deepspeed")
    one = updates(Alone(), *folders, ["ddp"])
    first, *others = on_processes(size, "preference_ranks.updates", *folders, engines, folder=tmp_path / "ranks")
    assert len(first) == 5 * len(engines)
    assert min(row["kto/kl"] for row in one["ddp: KTO"]["rows"]) > 1
    for case, ours in first.items():
        theirs = one["ddp: " + case.partition(": ")[2]]
        for row, expected in zip(ours["rows"], theirs["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5), case
        for a, b in zip(ours["logps"], theirs["logps"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-3), case
        for name, weight in theirs["weights"].items():
            torch.testing.assert_close(
                torch.tensor(ours["weights"][name]), torch.tensor(weight), atol=5e-5, rtol=0, msg=f"{case}: {name}"
            )
        for other in others:
            assert (other[case]["rows"], other[case]["weights"]) == (ours["rows"], ours["weights"]), case
