"""Held-out answers without a score: more than the budget end a run before it trains, and are told after it has."""

from __future__ import annotations

import json
import os

import pytest
from planted_server import Planted, planted_server
from tiny_loop import Loop
from warm import run_script

from alignment.loops.evaluation import Answer, HeldOut, answer_table, compare, evaluate, unscored_warning
from alignment.loops.ppo import train_ppo

QUICK = {"retries": 0, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def held_out(*scores: float | None) -> HeldOut:
    answers = [
        Answer(
            prompt_id=str(i),
            prompt=f"q{i}",
            response=f"a{i}",
            finish_reason="stop",
            scores={"score": score},
            failures={} if score is not None else {"far": "unavailable: gone"},
        )
        for i, score in enumerate(scores)
    ]
    return HeldOut(answers=answers, kl=0.0)


def test_only_items_with_both_numbers_are_compared_and_ranked():
    before, after = held_out(1.0, None, 2.0, 5.0), held_out(3.0, 9.0, None, 4.0)
    (row,) = compare(before, after, seed=1).values()
    assert (row["n"], row["before"], row["after"]) == (2, 3.0, 3.5)
    shown = answer_table(before, after, num_shown=4)
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("PROMPT")] == ["q0", "q3"]


def test_answers_to_other_prompts_are_not_compared():
    with pytest.raises(
        ValueError, match="got 2 before and 3 after with 2 prompts in common, expected the same prompts"
    ):
        compare(held_out(1.0, 2.0), held_out(1.0, 2.0, 3.0), seed=1)


def test_a_warning_counts_by_kind_what_the_budget_does_not_cover():
    assert unscored_warning(held_out(1.0, None), 0.5) == ""
    said = unscored_warning(held_out(1.0, None, None), 0.5)
    assert "2 of 3 held-out answers have no score (2 unavailable), more than reward.max_unscorable, 50%" in said


def test_the_budget_holds_for_held_out_answers_too(tiny, tmp_path):
    good = Planted({"scores": [0.5]})
    with planted_server(good, good, Planted(status=500)) as server:
        function = {
            "name": "remote:score",
            "samples_per_call": 1,
            "time_limit": 30,
            "settings": {"url": server.url, **QUICK},
        }
        loop = Loop(tiny, tmp_path / "run", train_ppo, reward={"functions": [function]})

        def answered(budget: float | None) -> HeldOut:
            roles = loop.roles
            return evaluate(
                loop.prompts[:4],
                policy=roles.policy,
                reference=roles.reference,
                reward=roles.reward,
                rollout=roles.rollout,
                version=0,
                max_unscorable=budget,
            )

        found = answered(0.5)
        with pytest.raises(RuntimeError, match=r"got 4 of 4 answers without a score \(4 unavailable; ") as stopped:
            answered(0.5)
        assert stopped.value.__notes__ == ["of the held-out prompts, before training: nothing was trained"]
        assert [answer.scores["score"] for answer in answered(None).answers] == [None] * 4
        loop.stack.close()
    assert [answer.scores["score"] for answer in found.answers] == [0.5, 0.5, None, None]
    assert [answer.failures.keys() for answer in found.answers] == [set(), set(), {"remote:score"}, {"remote:score"}]
    found.save(tmp_path / "held_out.json")
    assert HeldOut.load(tmp_path / "held_out.json") == found


def run(tiny, output, url: str):
    function = {"name": "remote:score", "part": "far", "time_limit": 30, "settings": {"url": url, **QUICK}}
    config = {
        "run": {"num_steps": 1, "trackers": []},
        "data": {"source": {"path": f"{tiny}/prompts.jsonl"}, "held_out": 3},
        "model": {"path": f"{tiny}/policy"},
        "reward": {"functions": [function]},
        "rollout": {"engine": "transformers", "max_new_tokens": 4},
        "ppo": {"rollout_batch_size": 4, "minibatch_size": 4},
    }
    output.with_suffix(".yaml").write_text(json.dumps(config))
    flags = ["--config", str(output.with_suffix(".yaml")), "--output-dir", str(output), "--local"]
    return run_script(["python", "recipes/ppo_medical.py", *flags], timeout=300)


def test_a_server_that_is_away_ends_a_run_before_it_trains(tiny, tmp_path):
    with planted_server(Planted(status=500)) as server:
        done = run(tiny, tmp_path / "o", server.url)
    assert done.returncode == 1
    assert "got 3 of 3 answers without a score (3 unavailable; " in done.stderr
    assert "before training: nothing was trained" in done.stderr
    assert not (tmp_path / "o" / "held_out_before.json").exists()
    assert not (tmp_path / "o" / "metrics.jsonl").exists()
    assert len(server.seen) == 1


def test_a_server_that_goes_away_in_the_end_costs_the_comparison_and_not_the_run(tiny, tmp_path):
    numbers = iter((3, 4))

    def answer(body: dict) -> Planted:
        expected = next(numbers, None)
        return Planted(status=500) if expected is None else Planted({"scores": [0.5] * expected})

    with planted_server(answer=answer) as server:
        done = run(tiny, tmp_path / "o", server.url)
    assert done.returncode == 0, done.stderr
    assert "WARNING: 3 of 3 held-out answers have no score (3 unavailable)" in done.stdout + done.stderr
    assert (tmp_path / "o" / "final" / "model.safetensors").is_file()
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert "score" not in summary["held_out"]
    assert summary["held_out"]["finished"]["n"] == 3
