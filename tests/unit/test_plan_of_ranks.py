"""What the planner says that a rank holds, and what real ranks of every engine hold."""

from __future__ import annotations

import pytest
from engine_runs import ENGINES, on_processes
from tiny import write_tiny_model

from alignment.planning.memory import Training, split_states
from alignment.planning.shape import read_shape

pytest.importorskip("deepspeed")
RANKS = 2


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_ranks_hold_what_is_planned(tmp_path, dtype):
    folder = tmp_path / "policy"
    write_tiny_model(folder)
    shape = read_shape(str(folder))
    ranks = on_processes(RANKS, "bytes_of_ranks", str(folder), dtype, folder=tmp_path / "ranks")
    assert set(ranks[0]) >= {"ddp", "fsdp2", "fsdp2, layers kept", "zero 2", "zero 3"}
    for engine in ranks[0]:
        training = Training(ranks=RANKS, **ENGINES[engine])
        planned = split_states(shape, training, shape.num_parameters(), dtype=dtype, scalar_head=False)
        for name in ("weights", "masters", "moments"):
            # Parts of one tensor may differ by a row, so the ranks' mean is compared; ZeRO pads the last part.
            found = sum(rank[engine][name] for rank in ranks) / RANKS
            assert found == pytest.approx(getattr(planned, name), rel=0.01), (engine, name)
