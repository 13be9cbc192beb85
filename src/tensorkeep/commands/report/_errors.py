"""Draw an error analysis as `eval detection --errors` gives it: kinds of errors, what they cost, what is missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._frame import Section

KINDS = {  # in the order of the parts of a bar -> what each means
    "true positive": "matched to an annotated segment of its class",
    "double detection": "right class and place, but that segment is taken",
    "wrong label": "on a segment of another class",
    "localisation": "right class, too little overlap",
    "confusion": "another class, and too little overlap",
    "background": "where nothing is annotated",
}
_BY = {
    "length s": "length in seconds",
    "coverage": "coverage, the share of the video",
    "same class in video": "segments of the same class in the video",
}
_MOST, _DRAWN = 400, 30  # classes that are listed, and drawn


def sections(errors: Mapping[str, Any]) -> list[Section]:
    """Return the parts of a page about errors.

    Args:
        errors: the document of an error analysis.
    """
    tiou = frame.figure(errors.get("tiou"))
    notes = errors.get("notes")
    told = "".join(frame.note(n) for n in notes[:20]) if isinstance(notes, list) else ""
    found = [
        Section(f"What the detections are, at tIoU {tiou}", told + _blocks(_rows(errors.get("kinds")))),
        Section("What each kind of error costs", _gains(errors)),
        Section("Class by class", _classes(_rows(errors.get("classes")))),
        Section("Annotated segments that are missed", _missed(_rows(errors.get("missed")))),
    ]
    return found


def worst(errors: Mapping[str, Any]) -> str:
    """Say which kind of error costs the most, and how much is missed.

    >>> worst({"tiou": 0.5, "gains": {"background": 0.02, "localisation": 0.2}})
    'At tIoU 0.5 localisation costs most: 20.00 points of mAP.'
    """
    parts, gains = [], errors.get("gains")
    values = {kind: _number(gains.get(kind)) for kind in KINDS} if isinstance(gains, Mapping) else {}
    most = max(values, key=lambda kind: values[kind], default="")
    if most and values[most] > 0:
        tiou = frame.figure(errors.get("tiou"))
        parts.append(f"At tIoU {tiou} {most} costs most: {100 * values[most]:.2f} points of mAP.")
    classes = _rows(errors.get("classes"))
    segments, missed = (sum(_number(row.get(key)) for row in classes) for key in ("segments", "missed"))
    if segments:
        parts.append(f"{missed:.0f} of {segments:.0f} annotated segments are missed.")
    return " ".join(parts)


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the objects of a list; none of what is no list."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _number(value: Any) -> float:
    """Return a figure, 0 for what is none."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if plain and math.isfinite(value) else 0.0


def legend() -> str:
    """Say what the colours mean."""
    keys = "".join(
        f'<span><svg width="14" height="14" aria-hidden="true"><path class="k{n}" d="M1,1h12v12h-12z"/></svg>'
        f"{kind}</span>"
        for n, kind in enumerate(KINDS)
    )
    return f"<p class='legend'>{keys}</p>"


def _stacked(shares: Sequence[float]) -> str:
    """Draw parts of a whole side by side."""
    parts, at = [], 0.0
    for number, (kind, share) in enumerate(zip(KINDS, shares, strict=True)):
        width = 100 * min(max(share, 0.0), 1.0)
        if width > 0:
            parts.append(
                f'<g><title>{kind}: {width:.1f} %</title><rect class="k{number}" x="{at:.2f}%" width="{width:.2f}%" '
                f'height="18"/></g>'
            )
        at += width
    return f'<svg aria-hidden="true">{"".join(parts)}</svg>'


def _bars(label: str, rows: str) -> str:
    """Return rows of bars as a figure that is read with the arrow keys."""
    return (
        f"<figure data-cells='1'><div class='bars' tabindex='0' role='group' aria-roledescription='chart' "
        f"aria-label='{frame.text(label, 120)}. Arrow keys read the bars.'>{rows}</div>"
        "<output aria-live='polite'></output></figure>"
    )


def _blocks(kinds: Sequence[Mapping[str, Any]]) -> str:
    """Draw what the best G detections of every class are, the next G, and so on."""
    if not kinds:
        return ""
    shares = [[_number(row.get(kind)) for kind in KINDS] for row in kinds[:20]]
    rows = "".join(
        f"<span>{n} G</span>{_stacked(row)}<span class='num'>{100 * row[0]:.0f} % true</span>"
        for n, row in enumerate(shares, 1)
    )
    told = frame.note("G is the number of annotated segments of a class: 1 G are its best G detections, 2 G the next.")
    cells = [[f"{n} G", *(f"{100 * share:.1f}" for share in row)] for n, row in enumerate(shares, 1)]
    listed = frame.table("Kinds of detections, in percent", ["detections", *KINDS], cells)
    return legend() + _bars("What the detections are", rows) + told + frame.folded("The figures as a table", listed)


def _gains(errors: Mapping[str, Any]) -> str:
    """Draw by how much the mAP would be higher without each kind of error."""
    gains = errors.get("gains")
    if not isinstance(gains, Mapping) or not gains:
        return ""
    values = {kind: _number(gains.get(kind)) for kind in list(KINDS)[1:]}
    top = max([*values.values(), 1e-9])
    rows = []
    for number, (kind, value) in enumerate(values.items(), 1):
        width = 100 * max(value, 0.0) / top
        bar = (
            f'<svg aria-hidden="true"><g><title>{kind}: mAP {100 * value:+.2f} points</title>'
            f'<rect class="k{number}" width="{width:.2f}%" height="18" rx="2"/></g></svg>'
        )
        rows.append(f"<span>{kind}</span>{bar}<span class='num'>{100 * value:+.2f}</span>")
    now = f"{100 * _number(errors.get('mAP')):.2f}"
    told = f"Points of mAP that would be gained if no detection were of the kind; now it is {now}."
    cells = [[kind, f"{100 * value:+.2f}", KINDS[kind]] for kind, value in values.items()]
    listed = frame.table("What each kind of error costs", ["kind", "points of mAP", "means"], cells, 9)
    return frame.note(told) + _bars("What each kind of error costs", "".join(rows)) + listed


def _classes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw and list the kinds of the G best detections of each class, the weakest class first."""
    if not rows:
        return ""
    ordered = sorted(rows, key=lambda row: _number(row.get("ap")))
    drawn: list[str] = []
    listed = []
    for row in ordered[:_MOST]:
        kinds = row.get("kinds")
        counts = [_number(kinds.get(kind)) if isinstance(kinds, Mapping) else 0.0 for kind in KINDS]
        segments, missed, ap = (_number(row.get(key)) for key in ("segments", "missed", "ap"))
        label = frame.text(row.get("label", ""), 80)
        if len(drawn) < _DRAWN:
            shares = [count / max(sum(counts), 1.0) for count in counts]
            drawn.append(f"<span>{label}</span>{_stacked(shares)}<span class='num'>AP {100 * ap:.1f}</span>")
        listed.append(
            [str(row.get("label", ""))[:200], f"{segments:.0f}", f"{missed:.0f}", f"{100 * ap:.2f}"]
            + [f"{count:.0f}" for count in counts]
        )
    columns = ["class", "segments", "missed", "AP", *KINDS]
    body = frame.table("Errors by class, of the G best detections of each", columns, listed)
    more = frame.note(f"{len(rows) - _MOST} more classes are not listed") if len(rows) > _MOST else ""
    few = frame.note(f"Drawn: the {_DRAWN} classes of the least average precision.") if len(rows) > _DRAWN else ""
    return (
        legend() + _bars("Errors by class", "".join(drawn)) + few + frame.folded("The figures as a table", body + more)
    )


def _missed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw and list which share of the annotated segments is missed, by length, coverage and crowding."""
    if not rows:
        return ""
    if not any(_number(row.get("share")) for row in rows):
        return frame.note("None is missed: each overlaps a detection of its class enough.")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows[:_MOST]:
        groups.setdefault(str(row.get("what", "")), []).append(row)
    parts = []
    for what, own in groups.items():
        bars = []
        for row in own:
            share = min(max(_number(row.get("share")), 0.0), 1.0)
            name, told = (
                frame.text(row.get("bin", ""), 60),
                f"{100 * share:.1f} % of {_number(row.get('segments')):.0f}",
            )
            bars.append(
                f'<span>{name}</span><svg aria-hidden="true"><g><title>{name}: {told} missed'
                f'</title><rect class="miss" width="{100 * share:.2f}%" height="18" rx="2"/></g></svg>'
                f"<span class='num'>{told}</span>"
            )
        parts.append(f"<h3>by {frame.text(_BY.get(what, what), 60)}</h3>{_bars(f'Missed by {what}', ''.join(bars))}")
    cells = [
        [
            str(r.get("what", "")),
            r.get("bin", ""),
            f"{_number(r.get('segments')):.0f}",
            f"{100 * _number(r.get('share')):.1f}",
        ]
        for r in rows[:_MOST]
    ]
    listed = frame.table("Missed segments", ["by", "bin", "segments", "missed, %"], cells, 2)
    return "".join(parts) + frame.folded("The figures as a table", listed)
