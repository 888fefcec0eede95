"""Every engine, on real processes over gloo: the updates of one process, and checkpoints that all of them share."""

from __future__ import annotations

import pytest
import torch
from engine_runs import ENGINES, RELAY, alone, learner_of, on_processes, policy_updates, update, value_updates
from tiny import write_tiny_model

from actors.loading import load_trained
from alignment.distributed import Alone

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "policy"
    write_tiny_model(folder, tie_word_embeddings=True)
    return str(folder)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=SLOW)])
def test_every_engine_makes_the_updates_of_one_process(policy, tmp_path, size):
    """The curves of five steps: with full weights and with LoRA, with ranks that have no row. Three ranks compute
    activations again in the backward pass."""
    one = policy_updates(Alone(), policy, ["ddp"], checkpointing=False)
    engines = list(ENGINES)
    first, *others = on_processes(size, "policy_updates", policy, engines, size == 3, folder=tmp_path / "ranks")
    assert len(first) == 2 * len(engines)
    for case, ours in first.items():
        theirs = one["ddp, LoRA" if case.endswith("LoRA") else "ddp, full"]
        for row, expected in zip(ours["rows"], theirs["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-5), case
        for row, expected in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4), case
        for name, weight in theirs["weights"].items():
            torch.testing.assert_close(
                torch.tensor(ours["weights"][name]), torch.tensor(weight), atol=5e-5, rtol=0, msg=f"{case}: {name}"
            )
        for other in others:
            assert (other[case]["rows"], other[case]["weights"]) == (ours["rows"], ours["weights"]), case


@SLOW
def test_values_and_gradients_that_are_not_finite(policy, tmp_path):
    """A critic's one pass gives every rank all values; one rank's gradient keeps all of them from stepping."""
    engines = ["ddp", "fsdp2", "zero 0", "zero 1", "zero 2", "zero 3"]
    one = value_updates(Alone(), policy, ["ddp"])["ddp"]
    for ours in on_processes(2, "value_updates", policy, engines, folder=tmp_path / "ranks"):
        for engine in engines:
            for row, expected in zip(ours[engine]["rows"], one["rows"], strict=True):
                assert row == pytest.approx(expected, rel=1e-4, abs=1e-5), engine
            for values, expected in zip(ours[engine]["values"], one["values"], strict=True):
                assert values == pytest.approx(expected, abs=1e-4), engine
            assert ours[engine]["skipped"] == 1, engine
            assert ours[engine]["same"], engine


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=SLOW)], ids=["full", "LoRA"])
def test_a_run_goes_on_under_another_engine_and_another_number_of_ranks(policy, tmp_path, lora):
    """One process, then two ranks of ZeRO-3, then six engines more, then one process: the curve of one process."""
    steps = len(RELAY) + 2
    curve = alone(policy, tmp_path / "saved", steps, lora=lora)
    rows = on_processes(2, "relay_of", policy, str(tmp_path / "saved"), lora, folder=tmp_path / "ranks")[0]
    last = learner_of(Alone(), policy, "ddp", lora=lora)
    load_trained(last.model, last, tmp_path / "saved")
    rows.append(update(last, steps - 1))
    for row, expected in zip(rows, curve[1:], strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        pytest.param(False, "float32", marks=SLOW),
        pytest.param(True, "float32", marks=SLOW),
        pytest.param(False, "bfloat16", marks=SLOW),
    ],
    ids=["full", "LoRA", "bfloat16"],
)
def test_what_an_engine_loads_is_what_it_saves_to_the_last_bit(policy, tmp_path, lora, dtype):
    """Moments, float32 masters and counts; on three ranks, which no size of a parameter is a multiple of."""
    alone(policy, tmp_path / "saved", 1, lora=lora, dtype=dtype)
    report = on_processes(3, "trips_of", policy, str(tmp_path / "saved"), lora, dtype, folder=tmp_path / "ranks")[0]
    assert report == dict.fromkeys(report, True)
    assert len(report) >= len(ENGINES) - 2
