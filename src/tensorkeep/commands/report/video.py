"""Make one offline HTML page of what `predict` found in a video: a timeline with frames, and what is annotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._films import film, key
from tensorkeep.commands.report._frame import Section
from tensorkeep.detection.results.matching import overlaps
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.errors import printable
from tensorkeep.output import duration

_TIOU = 0.5  # from which an annotated segment counts as found
_CLASSES = 6  # that are named in the sentence


def video_page(
    name: str,
    seconds: float,
    found: Sequence[NamedDetection],
    true: Sequence[NamedDetection] = (),
    pictures: Sequence[tuple[float, bytes]] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the page of one video.

    Args:
        name: of the video.
        seconds: its length.
        found: the detections that are shown.
        true: annotated segments; none where there are no annotations.
        pictures: small frames, each (seconds, JPEG file).
        facts: names and plain texts, for the head of the page.
    """
    drawn = film(name, seconds, found, true, pictures)
    told = "" if found else frame.note("Nothing was found above the score.")
    head = frame.top(name, facts=[(what, frame.text(said)) for what, said in facts], said=_said(seconds, found, true))
    section = Section("Timeline", f"{key(bool(true))}{drawn}{told}")
    return frame.page(printable(name, 180), head, [section], by="predict")


def _said(seconds: float, found: Sequence[NamedDetection], true: Sequence[NamedDetection]) -> str:
    """Say how much was found, of which classes, and how much of what is annotated."""
    counts = Counter(row.label for row in found).most_common()
    named = ", ".join(f"{count:,} {printable(label, 40)}" for label, count in counts[:_CLASSES])
    more = f" and {len(counts) - _CLASSES} more classes" if len(counts) > _CLASSES else ""
    plural = "" if len(found) == 1 else "s"
    parts = [f"{len(found):,} segment{plural} found in {duration(seconds)}{': ' if named else ''}{named}{more}."]
    if true:
        parts.append(f"{_met(found, true)} of {len(true):,} annotated segments are found (tIoU {_TIOU:g} or more).")
    return " ".join(parts)


def _met(found: Sequence[NamedDetection], true: Sequence[NamedDetection]) -> int:
    """Count the annotated segments that a detection of their class overlaps enough."""
    numbers = {label: n for n, label in enumerate(dict.fromkeys(row.label for row in (*true, *found)))}
    spans = [np.array([(row.start, row.end) for row in rows], float).reshape(-1, 2) for rows in (true, found)]
    keys = [np.array([numbers[row.label] for row in rows], np.int64) for rows in (true, found)]
    return len(set(overlaps(spans[0], keys[0], spans[1], keys[1], _TIOU).left.tolist()))
