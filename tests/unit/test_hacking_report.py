"""The table and the picture of proxy and gold."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from alignment.loops.hacking_report import COLOURS, hacking_plot, hacking_table, write_hacking_report
from alignment.run_directory import RunDirectory

NAME = "gold/text:a<b"
ROWS = [
    {
        "step": i,
        "kl/per_sequence": kl,
        "reward/mean": proxy,
        f"reward/{NAME}/mean": gold,
        "rollout/length": 40.0,
        "rollout/duplicate_share": 0.125,
        "hacking/parted": float(i == 2),
        "hacking/length": 0.0,
    }
    for i, (kl, proxy, gold) in enumerate([(-0.01, 0.0, 0.8), (4.0, 0.5, 1.0), (16.0, 1.0, 0.0), (None, None, 0.5)])
]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_table_has_a_line_per_step():
    assert hacking_table([*ROWS, {"step": 4, "reward/clipped_share": 0.25}], [NAME]).splitlines() == [
        "| step | sqrt(KL) | proxy | gold/text:a<b | tokens | duplicates | clipped | signs |",
        "|---|---|---|---|---|---|---|---|",
        "| 0 | 0 | 0 | 0.8 | 40 | 0.125 | - | - |",
        "| 1 | 2 | 0.5 | 1 | 40 | 0.125 | - | - |",
        "| 2 | 4 | 1 | 0 | 40 | 0.125 | - | parted |",
        "| 3 | - | - | 0.5 | 40 | 0.125 | - | - |",
        "| 4 | - | - | - | - | - | 0.25 | - |",
    ]


def test_the_picture_places_every_step_by_the_root_of_its_kl():
    picture = ElementTree.fromstring(hacking_plot(ROWS, [NAME], window=2))
    dots = [(float(d.get("cx")), float(d.get("cy")), d.get("fill")) for d in picture.iter(f"{SVG}circle")]
    # The frame is 70 .. 650 across and 360 .. 50 up; sqrt(KL) is 0, 2, 4, and a step without a KL has no place.
    proxy, gold = COLOURS[:2]
    assert dots == [
        (70, 360, proxy),
        (360, 205, proxy),
        (650, 50, proxy),
        (70, 112, gold),
        (360, 50, gold),
        (650, 360, gold),
    ]
    lines = [line.get("points") for line in picture.iter(f"{SVG}polyline")]
    assert lines == ["70.0,360.0 215.0,282.5 505.0,127.5", "70.0,112.0 215.0,81.0 505.0,205.0"]
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert words[:3] == [
        "square root of the KL to the reference, in nats per answer",
        "proxy (reward/mean)",
        "text:a<b (gold)",
    ]
    ticks = ["0", "1", "2", "3", "4"]
    assert words[3:8] == ticks
    assert words[8:] == ["0", "0.25", "0.5", "0.75", "1"] * 2


@pytest.mark.parametrize("rows", [ROWS[3:], ROWS[:1]], ids=["no step with a KL", "one step"])
def test_a_short_run_has_a_picture_too(rows):
    picture = ElementTree.fromstring(hacking_plot(rows, [NAME], window=10))
    assert len(list(picture.iter(f"{SVG}circle"))) == 2 * (rows is not ROWS[3:] and rows[0]["step"] == 0)


def test_files_are_written_of_runs_with_gold_alone_and_of_whole_lines(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    table = directory.path / "hacking.md"
    write_hacking_report(directory, [NAME], window=2)
    assert not table.exists()
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 4, "rew')
    write_hacking_report(directory, [], window=2)
    assert not table.exists()
    write_hacking_report(directory, [NAME], window=2)
    assert table.read_text() == hacking_table(ROWS, [NAME])
    assert (directory.path / "hacking.svg").read_text() == hacking_plot(ROWS, [NAME], window=2)
