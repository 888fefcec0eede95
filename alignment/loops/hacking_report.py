"""Proxy and gold of a finished or interrupted run over the square root of its KL: a table and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignment.config.reward import GOLD
from alignment.run_directory import RunDirectory

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 650, 50, 360
"""Of the picture, and of the frame in it."""
COLOURS = ("#1f5fa8", "#c4421a", "#3c7d22", "#7a4a9c", "#8a6d00")
"""Of the proxy, and of the gold parts in turn."""
NUM_TICKS = 5

Row = Mapping[str, Any]


def write_hacking_report(directory: RunDirectory, gold: Sequence[str], *, window: int) -> None:
    """`hacking.md` and `hacking.svg` from the metrics of all steps on disk; nothing without gold or without steps."""
    if not gold or not directory.metrics.exists():
        return
    with open(directory.metrics, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
    if rows:
        directory.write_text_atomic(directory.path / "hacking.md", hacking_table(rows, gold))
        directory.write_text_atomic(directory.path / "hacking.svg", hacking_plot(rows, gold, window=window))


def distance(row: Row) -> float | None:
    """Square root of the KL per sequence, a negative estimate counting as 0."""
    kl = row.get("kl/per_sequence")
    return None if kl is None else math.sqrt(max(kl, 0.0))


def hacking_table(rows: Iterable[Row], gold: Sequence[str]) -> str:
    """A line per step, as Markdown."""
    names = ["step", "sqrt(KL)", "proxy", *gold, "tokens", "duplicates", "clipped", "signs"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        clipped = [share for name, share in row.items() if name.endswith("/clipped_share") and share is not None]
        numbers = [
            distance(row),
            row.get("reward/mean"),
            *(row.get(f"reward/{name}/mean") for name in gold),
            row.get("rollout/length"),
            row.get("rollout/duplicate_share"),
            max(clipped, default=None),
        ]
        signs = [name.removeprefix("hacking/") for name, on in row.items() if name.startswith("hacking/") and on]
        shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
        lines.append("| " + " | ".join([str(row["step"]), *shown, ", ".join(signs) or "-"]) + " |")
    return "\n".join(lines) + "\n"


def hacking_plot(rows: Sequence[Row], gold: Sequence[str], *, window: int) -> str:
    """An SVG: a dot per step, a line through the running means of `window` steps; proxy on the left axis, gold on the
    right one."""
    keys = ["reward/mean", *(f"reward/{name}/mean" for name in gold)]
    curves = [
        [(x, y) for row in rows if (x := distance(row)) is not None and (y := row.get(key)) is not None]
        for key in keys
    ]
    across = _ticks([x for curve in curves for x, _ in curve])
    scales = [_ticks([y for _, y in curves[0]]), _ticks([y for curve in curves[1:] for _, y in curve])]
    body = [
        f'<rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" fill="none" stroke="#999"/>',
        _text((LEFT + RIGHT) / 2, BOTTOM + 42, "square root of the KL to the reference, in nats per answer"),
        _text(LEFT, TOP - 12, "proxy (reward/mean)", COLOURS[0], "start"),
        _text(RIGHT, TOP - 12, ", ".join(name.removeprefix(GOLD) for name in gold) + " (gold)", COLOURS[1], "end"),
    ]
    for x in across:
        body += [_text(_place(x, across, LEFT, RIGHT), BOTTOM + 18, f"{x:.3g}")]
    for ticks, where, anchor in ((scales[0], LEFT - 8, "end"), (scales[1], RIGHT + 8, "start")):
        body += [_text(where, _place(y, ticks, BOTTOM, TOP) + 4, f"{y:.3g}", "#333", anchor) for y in ticks]
    for i, curve in enumerate(curves):
        colour, ticks = COLOURS[i % len(COLOURS)], scales[min(i, 1)]
        points = [(_place(x, across, LEFT, RIGHT), _place(y, ticks, BOTTOM, TOP)) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in _running_means(points, window))
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}" opacity="0.35"/>' for x, y in points]
        body += [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>']
    style = 'font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def _ticks(values: Sequence[float]) -> list[float]:
    """Evenly from the lowest value to the highest."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    high = high if high > low else low + 1.0
    return [low + (high - low) * k / (NUM_TICKS - 1) for k in range(NUM_TICKS)]


def _place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
    return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


def _running_means(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Of each point and the window - 1 before it."""
    stretches = [points[max(0, end - window) : end] for end in range(1, len(points) + 1)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _text(x: float, y: float, text: str, colour: str = "#333", anchor: str = "middle") -> str:
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{safe}</text>'
