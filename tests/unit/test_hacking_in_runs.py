"""Gold rules and the signs of an exploited reward in the loop itself, on tiny models."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tiny_loop import Loop, config_of

from alignment.loops.hacking_report import write_hacking_report
from alignment.loops.ppo import PpoState, train_ppo, train_ppo_one_pass

RULE = {"name": "text:no_repetition"}
FUNCTIONS = [{**RULE, "clip": [2.0, 3.0]}]
GOLD = [{"name": "text:question_words"}, {"name": "text:length_between", "part": "long"}]


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def weights_after(loop: Loop, num_steps: int) -> list[torch.Tensor]:
    loop.up_to(num_steps)
    weights = loop.weights("policy")
    loop.stack.close()
    return weights


def test_gold_measures_every_answer_and_changes_no_weight(tiny, tmp_path):
    """Nor does one that fails: it has the budget of its own sign."""
    plain = weights_after(Loop(tiny, tmp_path / "plain", train_ppo, reward={"functions": [RULE]}), 2)
    failing = {"name": "exact_match:multiple_choice", "part": "none", "settings": {"answer": ["A", *[None] * 3]}}
    loop = Loop(tiny, tmp_path / "gold", train_ppo, reward={"functions": [RULE], "gold": [*GOLD, failing]})
    measured = weights_after(loop, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    rows = loop.metrics()
    samples = [json.loads(line) for line in loop.directory.rollouts.read_text().splitlines()]
    for row in rows:
        own = [sample["parts"] for sample in samples if sample["step"] == row["step"]]
        for name in ("gold/text:question_words", "gold/long"):
            numbers = [parts[name] for parts in own]
            assert row[f"reward/{name}/mean"] == pytest.approx(sum(numbers) / len(numbers))
        assert row["reward/unscorable_count"] == 0
        assert row["reward/gold/none/unscored_count"] == row["reward/gold_unscored/none"] == 3
        assert "reward/unscored/none" not in row
    assert all(sample["score"] == sample["parts"]["text:no_repetition"] for sample in samples)


def quiet(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("timing/")}


@pytest.mark.parametrize("train", [train_ppo, train_ppo_one_pass])
def test_a_run_that_was_taken_up_again_gives_the_same_warnings(tiny, tmp_path, train, capsys):
    """All scores are cut by the clip, which is told after the third step; the run is taken up after its second."""
    settings = {"reward": {"functions": FUNCTIONS, "gold": GOLD}, "hacking": {"window": 3}}
    whole = Loop(tiny, tmp_path / "whole", train, **settings)
    whole.up_to(4)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert told == [
        "WARNING  step 2: 100% of the scores of the last 3 steps are cut by a clip: above it nothing is told; "
        "see docs/reward_hacking.md"
    ]
    again = Loop(tiny, tmp_path / "again", train, **settings)
    again.up_to(2)
    saved = json.loads((again.directory.checkpoints / "step_000002" / "loop.json").read_text())
    again.state = PpoState.start(config_of(tiny, num_steps=1, limit=None, **settings))
    again.state.load_state_dict(saved)
    again.up_to(4)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")] == told
    assert again.state.state_dict() == whole.state.state_dict()
    assert [quiet(row) for row in again.metrics()] == [quiet(row) for row in whole.metrics()]
    assert [row["hacking/clipped"] for row in whole.metrics()] == [0, 0, 1, 1]
    assert whole.state.hacking.summary()["clipped"] == {"holds": True, "began": [2]}
    assert whole.metrics()[0]["rollout/length_drift"] == 1
    for loop in (whole, again):
        loop.stack.close()


def test_a_sign_ends_the_run_only_where_the_config_says_so_and_leaves_a_report(tiny, tmp_path):
    reward = {"functions": FUNCTIONS, "gold": GOLD}
    loop = Loop(
        tiny, tmp_path / "run", train_ppo, reward=reward, hacking={"window": 3, "stop_on": ["duplicates", "clipped"]}
    )
    with pytest.raises(RuntimeError, match=r"step 2: 100% of the scores .* expected no clipped with hacking\.stop_on"):
        loop.up_to(4)
    assert loop.run.store.complete() == [1, 2]
    assert [row["step"] for row in loop.metrics()] == [0, 1, 2]
    write_hacking_report(loop.directory, ["gold/text:question_words", "gold/long"], window=3)
    table = (loop.directory.path / "hacking.md").read_text().splitlines()
    assert [line.split(" | ")[-1] for line in table[2:]] == ["- |", "- |", "clipped |"]
    assert (loop.directory.path / "hacking.svg").stat().st_mode & 0o077 == 0
    loop.stack.close()
