"""Recipes on pairs and labels, whole: what they print and leave, a plan, refusals before the start."""

from __future__ import annotations

import json
import os

import pytest
from tiny import write_tiny_model

from alignment import plan
from recipes import dpo_chinese, dpo_medical, kto_medical


@pytest.fixture(autouse=True)
def _same_umask_afterwards():
    before = os.umask(0o022)
    yield
    os.umask(before)


def flags_of(tiny, folder, kind, rows, more="") -> list[str]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{kind}.yaml").write_text(
        f"""
run: {{num_steps: 4, checkpoint_every: 4, trackers: []}}
data: {{sources: [{{path: {folder}/rows.jsonl, name: own}}], held_out: 6, max_tokens: 96}}
model: {{path: {tiny}/policy}}
{kind}: {{beta: 0.2}}
training: {{batch_size: 8, validate_every: 2, optimizer: {{lr: 2.0e-3}}}}
{more}
"""
    )
    return ["--local", "--config", str(folder / f"{kind}.yaml"), "--output-dir", str(folder / "run")]


@pytest.fixture
def dpo(tiny, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("RAYLIGN_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Topic {i}?", "chosen": f"Well, {i}. Rest.", "rejected": "Sorry!"} for i in range(24)]
    return flags_of(tiny, tmp_path, "dpo", [*rows, rows[0]])


@pytest.fixture
def kto(tiny, tmp_path) -> list[str]:
    rows = [{"prompt": f"Topic {i}?", "response": f"Well, {i}.", "label": i % 4 > 0} for i in range(24)]
    return flags_of(tiny, tmp_path, "kto", rows)


def test_a_run_on_pairs_leaves_a_table_a_card_and_no_text_on_the_screen(tmp_path, dpo, capsys):
    assert dpo_medical.main([*dpo, "--reference.mode", "cached"]) == 0
    told = capsys.readouterr()
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["held_out"]) == {"implicit_accuracy", "implicit_margin", "likelihood_accuracy"}
    for row in summary["held_out"].values():
        assert row["n"] == 6
        assert row["gain_ci95"][0] <= row["after"] - row["before"] <= row["gain_ci95"][1]
    # Step 2's validation and the table's numbers are of the same rows; the best step is taken.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"] + 1: r["validation/loss"] for r in rows if "validation/loss" in r}
    best = min(losses, key=losses.get)
    assert f"weights of optimiser step {best}" in (run / "final" / "README.md").read_text()
    margin = next(r["validation/margin"] for r in rows if r["step"] + 1 == best)
    assert summary["held_out"]["implicit_margin"]["after"] == pytest.approx(margin, rel=1e-5)
    assert "warning: longer answers win" in (run / "hygiene.txt").read_text()
    assert "own: 18 pairs of 18 prompts" in told.out
    assert (run / "hygiene.txt").read_text().startswith("own: 18 train, 6 held out (rows 25, duplicates 1,")
    assert "records computed and written" in told.out + told.err
    for text in (told.out, told.err, (run / "hygiene.txt").read_text(), (run / "final" / "README.md").read_text()):
        assert "Topic" not in text
        assert "Sorry" not in text


def test_classes_out_of_balance_are_told_of_or_weighted(tmp_path, kto, capsys):
    assert kto_medical.main([*kto, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "warning: got" in shown
    assert "set desirable_weight to" in shown
    assert "weights: desirable 1, undesirable 1\n" in shown
    assert "8 answers a step = up to 2 accumulated micro-batches x 4 answers x 1 workers" in shown
    assert kto_medical.main([*kto, "--dry-run", "--kto.balance", "auto"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_plan_has_a_frozen_copy_beside_a_policy_trained_in_full(tmp_path, dpo, capsys):
    assert dpo_medical.main([*dpo, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "(policy + reference)" in shown
    assert "8 pairs a step" in shown
    assert dpo_medical.main([*dpo, "--dry-run", "--training.adapter.r", "4"]) == 0
    assert "(policy)" in capsys.readouterr().out
    assert plan.main(["--config", str(tmp_path / "dpo.yaml")]) == 0
    assert "(policy + reference)" in capsys.readouterr().out


ASKED = ["--evaluation.source.path", "ROWS"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--reference.mode", "none"], "reference.mode: got none with dpo.terms"),
        (["--data.sources", "[{path: nowhere.jsonl}]"], "'nowhere.jsonl', which matches no file"),
        (
            ["--reference.sync_every", "2", "--reference.sync_share", "0.01", "--model.dtype", "bfloat16"],
            "reference.sync_share: got 0.01 with model.dtype bfloat16, expected float32",
        ),
        (["--data.held_out", "24"], "leaves none to train on"),
        (["--model.path", "runs/nowhere/final"], "runs/nowhere/final"),
        (
            [*ASKED, "--evaluation.num_prompts", "9", "--evaluation.functions", '[{name: "numbers:final_number"}]'],
            "expected column",
        ),
        (
            [*ASKED, "--evaluation.num_prompts", "25", "--evaluation.functions", '[{name: "text:finished_sentence"}]'],
            "evaluation.num_prompts: got 25, expected at most the 24",
        ),
    ],
)
def test_refusals_of_pairs_before_the_start(tmp_path, dpo, capsys, flags, reason):
    given = [flag.replace("ROWS", str(tmp_path / "rows.jsonl")) for flag in flags]
    assert dpo_chinese.main([*dpo, *given]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_with_a_limited_view_is_refused_before_the_start(tmp_path, dpo, capsys):
    folder = write_tiny_model(tmp_path / "narrow", "mistral", sliding_window=4)
    shared = [*dpo, "--dpo.share_prompts", "true", "--dry-run"]
    assert dpo_chinese.main([*shared, "--model.path", str(folder)]) == 2
    assert "do not all look back to the first token" in capsys.readouterr().err
    assert dpo_chinese.main(shared) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("machines", "splits"),
    [
        ("num_workers: 2, zero_stage: 2", True),
        ("num_workers: 2, engine: deepspeed, zero_stage: 3", True),
        ("num_workers: 2, engine: deepspeed, zero_stage: 2", False),
        ("num_workers: 2", False),
    ],
)
def test_workers_that_hold_parts_of_the_model_are_not_asked(tmp_path, dpo, capsys, machines, splits):
    (tmp_path / "cluster.yaml").write_text(f"policy: {{{machines}, cpus_per_worker: 0.2}}\ncolocate: []\n")
    asked = ["--evaluation.source.path", f"{tmp_path}/rows.jsonl", "--evaluation.num_prompts", "5"]
    asked += ["--evaluation.functions", '[{name: "text:finished_sentence"}]', "--dry-run"]
    given = [*dpo[1:], *asked, "--cluster", str(tmp_path / "cluster.yaml")]
    assert dpo_medical.main(given) == (2 if splits else 0)
    assert ("expected workers that hold the whole model" in capsys.readouterr().err) == splits


def test_held_out_answers_of_one_class_are_refused(tmp_path, kto, capsys):
    rows = [{"prompt": f"Topic {i}?", "response": f"Well, {i}.", "label": True} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kto_medical.main(kto) == 2
    assert "data.held_out: got 6 answers of one class alone" in capsys.readouterr().err


def test_answers_that_do_not_fit_behind_other_prompts_are_refused(tmp_path, kto, capsys):
    """Each row fits the model's positions, but not the longest answer behind the longest prompt."""
    rows = [{"prompt": f"Topic {i}?", "response": f"Well, {i}.", "label": i % 4 > 0} for i in range(24)]
    rows += [
        {"prompt": "Why? " * 10, "response": "So.", "label": True},
        {"prompt": "Why?", "response": "So. " * 10, "label": False},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = [
        "--model.path",
        str(write_tiny_model(tmp_path / "short", max_position_embeddings=96)),
        "--dry-run",
    ]
    assert kto_medical.main([*kto, *model]) == 2
    assert "(the longest prompt " in (said := capsys.readouterr().err)
    assert "expected at most the 96 positions" in said
    assert kto_medical.main([*kto, *model, "--kto.loss", "bco"]) == 0


def test_prompts_that_are_answered_for_the_table_are_not_trained_on(tmp_path, dpo, capsys):
    """The same hash chooses both: of five prompts two are held out already."""
    more = ["--evaluation.num_prompts", "5", "--evaluation.functions", '[{name: "text:finished_sentence"}]']
    more += ["--data.held_out", "2", "--evaluation.source.path", f"{tmp_path}/rows.jsonl"]
    assert dpo_medical.main([*dpo, "--dry-run", *more]) == 0
    expected = "own: 19 train, 2 held out (rows 25, duplicates 1, chosen longer 24, held out too 3)"
    assert expected in capsys.readouterr().out
