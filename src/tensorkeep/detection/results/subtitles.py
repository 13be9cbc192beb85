"""Detections as subtitles, so that any player shows what was found while it plays: SubRip (SRT) and WebVTT.

Actions overlap, and players disagree about cues that do. So at most a few detections share the screen, the best ones,
and each keeps its own line from its start to its end. WebVTT can say so: a cue is a detection, on its line. SubRip
cannot: its cues never overlap, a new one begins wherever an action begins or ends, and lists what goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

LINES = 4  # detections on the screen at once


class Row(NamedTuple):
    """One detection: seconds, class name, score."""

    start: float
    end: float
    label: str
    score: float


class Cue(NamedTuple):
    """One detection on the screen: milliseconds from the first picture, the line from below (0 is the lowest)."""

    start: int
    end: int
    line: int
    text: str


def best_rows(rows: Sequence[Row], min_score: float, top: int) -> list[Row]:
    """The `top` best of the rows that score at least `min_score`, in order of time; of equal scores the earlier in
    `rows`.

    >>> best_rows([Row(5, 6, "a", 0.9), Row(1, 2, "b", 0.5), Row(0, 9, "c", 0.1)], 0.3, 9)
    [Row(start=1, end=2, label='b', score=0.5), Row(start=5, end=6, label='a', score=0.9)]
    """
    kept = sorted((row for row in rows if row.score >= min_score), key=lambda row: -row.score)[:top]
    return sorted(kept, key=lambda row: (row.start, row.end))


def make_cues(rows: Sequence[Row], lines: int = LINES) -> list[Cue]:
    """Cues in order of time. The best row chooses its line first; one that finds none free is left out, as is one
    that is shorter than a millisecond.

    >>> [(cue.line, cue.text) for cue in make_cues([Row(0, 4, "a", 0.5), Row(2, 6, "b", 0.875), Row(4, 5, "c", 0.25)])]
    [(1, 'a 0.50'), (0, 'b 0.88'), (1, 'c 0.25')]
    """
    taken: list[list[Cue]] = [[] for _ in range(lines)]
    for row in sorted(rows, key=lambda row: -row.score):
        start, end = round(row.start * 1000), round(row.end * 1000)
        text = f"{_shown(row.label)} {row.score:.2f}"
        for line, cues in enumerate(taken):
            if start < end and all(end <= cue.start or cue.end <= start for cue in cues):
                cues.append(Cue(start, end, line, text))
                break
    return sorted(cue for cues in taken for cue in cues)


def to_webvtt(cues: Sequence[Cue]) -> str:
    """A WebVTT file: one cue a detection, on its line."""
    parts = ["WEBVTT\n"]
    for cue in cues:
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f"{clock(cue.start, '.')} --> {clock(cue.end, '.')} line:{-1 - cue.line}\n{text}\n")
    return "\n".join(parts)


def to_srt(cues: Sequence[Cue]) -> str:
    """A SubRip file: cues follow one another, each with a line for every detection then; the lowest line comes last."""
    edges = sorted({cue.start for cue in cues} | {cue.end for cue in cues})
    parts: list[str] = []
    for start, end in pairwise(edges):
        shown = sorted((cue for cue in cues if cue.start <= start < cue.end), key=lambda cue: -cue.line)
        if shown:
            text = "\n".join(cue.text.replace("-->", "→") for cue in shown)
            parts.append(f"{len(parts) + 1}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n")
    return "\n".join(parts)


def clock(milliseconds: int, mark: str) -> str:
    """`HH:MM:SS` and the milliseconds after `mark`.

    >>> clock(3_723_004, ",")
    '01:02:03,004'
    """
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{rest:03}"


def _shown(label: str) -> str:
    """A class name on one line of printable characters: an empty line would end the cue."""
    return " ".join("".join(c if c.isprintable() else " " for c in label).split()) or "?"
