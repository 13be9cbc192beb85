"""Make one offline HTML page of a run: loss and evaluations over the steps, the last figures, what it predicts.

Works from RUN/metrics.jsonl alone, of any kind of run. Where `predict` wrote into RUN/predictions, timelines follow,
with true segments and pictures of the videos where the run's recipe leads to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tensorkeep.commands.report._style import STYLE
from tensorkeep.commands.report._timelines import timelines
from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.output import figure
from tensorkeep.storage.overwriting import PAGE
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import metrics

_Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, _BOTTOM = 900, 200, 64, 24  # pixels of a curve's plane, margins of its numbers
PREDICTIONS = "predictions/detections.json"
_CURVE = """
.curve line { stroke: var(--line); } .curve polyline { fill: none; stroke: var(--bar1); stroke-width: 1.5; }
.curve circle { fill: var(--bar1); } .curve circle.best { fill: var(--good); }
.curve svg { max-width: 100%; height: auto; }
"""


def run_page(run: str | Path) -> str:
    """Return the page of a run's folder.

    Raises:
        TensorkeepError: it has no metrics.
    """
    run = Path(run)
    rows = list(metrics.rows(run / metrics.METRICS))
    if not rows:
        hint = "a run of `tensorkeep train` writes it; for a diagnosis name its JSON document"
        raise TensorkeepError("has no metrics", where=run / metrics.METRICS, hint=hint)
    updates = [row for row in rows if "evaluation" not in row]
    evaluations = [row for row in rows if isinstance(row.get("evaluation"), Mapping)]
    parts = [_head(run, updates, evaluations)]
    parts.append(_section("Loss", [curve(points(updates, "loss"), "loss over the steps")]))
    parts.append(_section("Learning rate", [curve(points(updates, "lr"), "learning rate over the steps")]))
    names = list(dict.fromkeys(name for row in evaluations for name in row["evaluation"]))
    for name in names[:1] if "average_mAP" in names else names:
        share = "mAP" in name or name.startswith("recall")  # files hold shares of 1, people are shown percent
        values = points([{"step": row["step"], **row["evaluation"]} for row in evaluations], name)
        values = [(step, 100 * value) for step, value in values] if share else values
        best = (min if "loss" in name or "perplexity" in name else max)(values, key=lambda p: p[1], default=None)
        title = f"{name}, in percent" if share else name
        parts.append(_section(title, [curve(values, f"{title} over the steps", best)]))
    if evaluations:
        parts.append(_section("Evaluations", [_table(evaluations, names)]))
    if (run / PREDICTIONS).is_file():
        parts.append(_section("Predictions", timelines(run, run / PREDICTIONS)))
    title = escape(printable(str(run), 200))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Run {title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<style>{STYLE}{_CURVE}</style></head><body><main>{''.join(parts)}<footer>Written by tensorkeep report. "
        "Nothing on this page is loaded from elsewhere.</footer></main></body></html>\n"
    )


def write_run_page(run: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Write a run's page into a file.

    >>> write_run_page("runs/one", "one.html")  # doctest: +SKIP
    """
    text = run_page(run)
    with replacing(Path(out), overwrite, PAGE) as temporary:
        write_bytes(temporary, text.encode())


def points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return step and value of every row that has a finite number under `name`."""
    found = [(row["step"], row.get(name)) for row in rows]
    return [(step, float(v)) for step, v in found if isinstance(v, int | float) and math.isfinite(v)]


def curve(values: _Points, label: str, best: tuple[float, float] | None = None) -> str:
    """Draw an SVG line through (step, value); a long one is thinned to the lowest and highest value of each pixel."""
    if not values:
        return "<p class='note'>no value was noted</p>"
    (first, last), low, high = (values[0][0], values[-1][0]), min(v for _, v in values), max(v for _, v in values)
    wide, tall = max(last - first, 1), (high - low) or max(abs(high), 1e-12)

    def at(step: float, value: float) -> tuple[float, float]:
        return LEFT + (step - first) / wide * WIDTH, 8 + (high - value) / tall * HEIGHT

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in _thinned(values)))
    marks = []
    for share in (0.0, 0.5, 1.0):
        x, y = LEFT + share * WIDTH, 8 + share * HEIGHT
        value = high - share * tall
        marks.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
            f'<text class="axis" x="{x:.1f}" y="{HEIGHT + _BOTTOM}" text-anchor="middle">'
            f"{_step(first + share * wide)}</text>"
        )
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in (at(*p) for p in values) if len(values) <= 60]
    if best is not None:
        x, y = at(*best)
        told = f"best: {best[1]:.4g} at step {best[0]:,.0f}"
        dots.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{told}</title></circle>')
    width, height = LEFT + WIDTH + 40, HEIGHT + _BOTTOM + 8
    return (
        f'<div class="curve"><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}<polyline points="{line}"/>{"".join(dots)}</svg></div>'
    )


def _step(value: float) -> str:
    """Return a step with separators, and decimals where it has them."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _thinned(values: _Points) -> list[tuple[float, float]]:
    """Keep at most two values for each pixel, its extremes, so that no spike is lost."""
    if len(values) <= 2 * WIDTH:
        return list(values)
    kept: list[tuple[float, float]] = []
    size = -(-len(values) // WIDTH)
    for start in range(0, len(values), size):
        block = values[start : start + size]
        ends = {min(block, key=lambda p: p[1]), max(block, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _head(run: Path, updates: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's head: the folder, and tiles with the last figures."""
    last = max((row["step"] for row in (*updates, *evaluations)), default=0)
    tiles = [("step", f"{last:,}")]
    if losses := points(updates, "loss"):
        tiles.append(("last loss", f"{losses[-1][1]:.4g}"))
    if evaluations:
        scores = [v for _, v in points([{"step": r["step"], **r["evaluation"]} for r in evaluations], "average_mAP")]
        tiles += [("best average mAP", figure("mAP", max(scores)))] if scores else []
    body = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    where = escape(printable(str(run), 400))
    return (
        f"<header><h1>Run</h1><dl><dt>folder</dt><dd><code>{where}</code></dd></dl></header>"
        f"<div class='tiles'>{body}</div>"
    )


def _section(title: str, parts: Sequence[str]) -> str:
    """Return parts under a title."""
    return f"<section><h2>{escape(printable(title, 100))}</h2><div class='scroll'>{''.join(parts)}</div></section>"


def _table(evaluations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return the last evaluations as a table."""
    head = "".join(f"<th class='num'>{escape(printable(name, 60))}</th>" for name in ("step", *names))
    body = "".join(
        f"<tr><td class='num'>{row['step']:,}</td>"
        + "".join(f"<td class='num'>{_figure(name, row['evaluation'].get(name))}</td>" for name in names)
        + "</tr>"
        for row in evaluations[-20:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(name: str, value: Any) -> str:
    """Return a figure for the table."""
    return figure(name, value, 5) if isinstance(value, int | float) and math.isfinite(value) else "-"
