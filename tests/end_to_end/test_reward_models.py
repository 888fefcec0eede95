"""A reward-model recipe on labels, whole: the report, the card, the scale of its scores, a plan, refusals."""

from __future__ import annotations

import json
import os
import stat

import pytest

from alignment.models import load_scalar_model
from recipes import reward_model_judgements


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def flags(tiny, tmp_path) -> list[str]:
    rows = [
        {
            "prompt": f"Topic {i}?",
            "response": "Sorry!" if i % 2 else f"Well, {i}.",
            "label": i % 2,
            "kind": f"k{i % 3}",
        }
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rm.yaml").write_text(
        f"""
run: {{num_steps: 6, checkpoint_every: 3, trackers: []}}
data: {{source: {{path: {tmp_path}/rows.jsonl}}, held_out: 8}}
model: {{path: {tiny}/policy}}
training: {{batch_size: 8, validate_every: 2, optimizer: {{lr: 3.0e-3}}}}
"""
    )
    return ["--local", "--config", str(tmp_path / "rm.yaml"), "--output-dir", str(tmp_path / "run")]


def test_a_run_on_labels_leaves_a_report_a_card_and_a_scale(tmp_path, flags, capsys):
    assert reward_model_judgements.main(flags) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    row = summary["held_out"]["accuracy"]
    assert report["kind"] == "labels"
    assert report["accuracy"]["accuracy"] == row["after"]
    assert report["accuracy"]["accuracy_ci95"] == row["after_ci95"]
    assert row["n"] == 8
    assert set(report["by_source"]) <= {"k0", "k1", "k2"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"] + 1: r["validation/loss"] for r in rows if "validation/loss" in r}
    assert set(losses) == {2, 4, 6}
    assert report["step"] == min(losses, key=losses.get)
    for name in ("report.json", "report.md"):
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o600
        assert "Topic" in (run / name).read_text()
    card = (run / "final" / "README.md").read_text()
    assert f"weights of optimiser step {report['step']}" in card
    assert "sha256 of labels" in card
    for text in (shown, card):
        assert "Topic" not in text
        assert "Sorry" not in text
    assert "held-out accuracy" in shown
    saved = json.loads((run / "final" / "score_statistics.json").read_text())
    assert saved["count"] == 8
    assert saved["mean"] == pytest.approx(report["scores"]["mean"])
    assert saved["std"] == pytest.approx(report["scores"]["std"])
    load_scalar_model(str(run / "final"))


def test_a_plan_counts_answers_of_one_sequence(tmp_path, flags, capsys):
    assert reward_model_judgements.main([*flags, "--dry-run", "--data.kind", "labels"]) == 0
    shown = capsys.readouterr().out
    assert "labels: 16 train, 8 held out (rows 24, positive 12)" in shown
    assert "8 rows a step = up to 2 accumulated micro-batches x 4 rows x 1 workers" in shown
    assert not (tmp_path / "run").exists()


def test_rows_of_another_kind_are_refused_before_the_start(tmp_path, flags, capsys):
    assert reward_model_judgements.main([*flags, "--data.kind", "steps"]) == 2
    assert "rows.jsonl:1: got a row of labels, expected steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_order_with_ties_is_refused_for_plackett_luce(tmp_path, flags, capsys):
    row = {"prompt": "q", "answers": ["a", "b", "c"], "ranks": [1, 2, 2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "p"}) + "\n")
    more = ["--data.held_out", "1", "--training.ranking_loss", "plackett_luce"]
    assert reward_model_judgements.main([*flags, *more]) == 2
    assert "training.ranking_loss: got plackett_luce with 2 rankings that have ties" in capsys.readouterr().err
