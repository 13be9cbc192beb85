"""Make one offline HTML page from the document of `eval detection --json`: mAP by class and tIoU, and the errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorkeep.commands.report import _errors as errors
from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._frame import Section
from tensorkeep.errors import printable

_MOST, _WIDE = 400, 20  # classes, thresholds


def scored_page(document: Mapping[str, Any], path: Path) -> str:
    """Return the whole page of an evaluation of detections.

    Args:
        document: of `eval detection --json`.
        path: its file.
    """
    named = document.get("checkpoint") or path
    facts = [("of", frame.code(named))]
    facts += [(key, frame.text(document[key], 80)) for key in ("protocol", "subset") if document.get(key)]
    tiles = [
        (_percent(document.get("average_mAP")), "average mAP, percent"),
        (frame.figure(document.get("detections")), "detections"),
    ]
    found = document.get("errors")
    notes = [
        n for key in ("notes", "annotation_problems") if isinstance(document.get(key), list) for n in document[key]
    ]
    parts = errors.sections(found) if isinstance(found, Mapping) else []
    if not parts:
        notes.append("no error analysis: tensorkeep eval detection ... --errors 0.5 --json makes one")
    sections = [
        Section("Average precision", _table(document)),
        *parts,
        Section("Notes", "".join(frame.note(n) for n in notes[:40])),
    ]
    said = f"Average mAP {_percent(document.get('average_mAP'))} %."
    if isinstance(found, Mapping):
        said = f"{said} {errors.worst(found)}".strip()
    head = frame.top("Detections scored", facts=facts, said=said) + frame.tiles(tiles)
    return frame.page(printable(f"Detections of {named} scored", 180), head, sections)


def _percent(value: Any) -> str:
    """Return a share in percent, a dash for what is none."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
    return f"{100 * value:.2f}" if plain and math.isfinite(value) else "-"


def _table(document: Mapping[str, Any]) -> str:
    """List the average precision of every class at every threshold, in percent, and the means."""
    tiou, ap, mean = document.get("tiou"), document.get("AP"), document.get("mAP")
    if not isinstance(tiou, list) or not isinstance(ap, Mapping):
        return ""
    segments = document.get("segments")
    counts = segments if isinstance(segments, Mapping) else {}
    rows = [["all classes", "", *map(_percent, mean[:_WIDE] if isinstance(mean, list) else [])]]
    rows += [
        [str(name), frame.figure(counts.get(name)), *map(_percent, row[:_WIDE])]
        for name, row in list(ap.items())[:_MOST]
        if isinstance(row, list)
    ]
    more = frame.note(f"{len(ap) - _MOST} more classes are not listed") if len(ap) > _MOST else ""
    columns = ["class", "segments", *(f"tIoU {frame.figure(value)}" for value in tiou[:_WIDE])]
    return frame.table("Average precision in percent", columns, rows) + more
