"""Write detections as subtitles, SubRip (SRT) or WebVTT, so that any player shows what was found while it plays.

Actions overlap, and players disagree about cues that do. So at most a few detections share the screen, the best ones,
and each keeps its own line from its start to its end. WebVTT can say so: a cue is a detection, on its line. SubRip
cannot: its cues never overlap, a new one begins wherever an action begins or ends, and lists what goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from tensorkeep.errors import printable
from tensorkeep.storage.overwriting import lone_file

LINES = 4  # detections on the screen at once
_CLOCK, _SHOWN = r"\d{2,}:\d\d:\d\d[.,]\d{3}", r"[^\n]+ \d\.\d\d\n"
# known by their first cue, which ends in a score: other subtitles of the same video do not
SRT = lone_file("subtitles of tensorkeep", rf"1\n{_CLOCK} --> {_CLOCK}\n({_SHOWN})+(\n|$)")
VTT = lone_file("subtitles of tensorkeep", rf"WEBVTT\n($|\n{_CLOCK} --> {_CLOCK} line:-\d+\n{_SHOWN}(\n|$))")


class NamedDetection(NamedTuple):
    """One detection for people to read.

    Attributes:
        start: seconds.
        end: seconds.
        label: class name.
        score: 0 to 1.
    """

    start: float
    end: float
    label: str
    score: float


class Cue(NamedTuple):
    """One detection on the screen.

    Attributes:
        start: milliseconds from the first picture.
        end: milliseconds from the first picture.
        line: counted from below, 0 is the lowest.
        text: what is shown.
    """

    start: int
    end: int
    line: int
    text: str


def best_rows(rows: Sequence[NamedDetection], min_score: float, top: int) -> list[NamedDetection]:
    """Return the `top` best rows that score at least `min_score`, in order of time.

    Of equal scores the earlier in `rows` is taken.

    Args:
        rows: detections of one video.
        min_score: least score.
        top: most rows.

    Example:
        >>> rows = [NamedDetection(5, 6, "a", 0.9), NamedDetection(1, 2, "b", 0.5), NamedDetection(0, 9, "c", 0.1)]
        >>> [row.label for row in best_rows(rows, 0.3, 9)]
        ['b', 'a']
    """
    kept = sorted((row for row in rows if row.score >= min_score), key=lambda row: -row.score)[:top]
    return sorted(kept, key=lambda row: (row.start, row.end))


def make_cues(rows: Sequence[NamedDetection], lines: int = LINES) -> list[Cue]:
    """Make cues, in order of time, of which at most `lines` are on the screen at once.

    The best row chooses its line first; one that finds none free is left out, as is one that is shorter than a
    millisecond.

    Args:
        rows: detections of one video.
        lines: most cues at a time.

    Returns:
        The cues, times in milliseconds.

    Example:
        >>> rows = [NamedDetection(0, 4, "a", 0.5), NamedDetection(2, 6, "b", 0.875), NamedDetection(4, 5, "c", 0.25)]
        >>> [(cue.line, cue.text) for cue in make_cues(rows)]
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
    """Return the text of a WebVTT file: one cue for each detection, on its line.

    Args:
        cues: of one video.
    """
    parts = ["WEBVTT\n"]
    for cue in cues:
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        parts.append(f"{clock(cue.start, '.')} --> {clock(cue.end, '.')} line:{-1 - cue.line}\n{text}\n")
    return "\n".join(parts)


def to_srt(cues: Sequence[Cue]) -> str:
    """Return the text of a SubRip file: cues follow one another, each lists what goes on then, the lowest line last.

    Args:
        cues: of one video.
    """
    edges = sorted({cue.start for cue in cues} | {cue.end for cue in cues})
    parts: list[str] = []
    for start, end in pairwise(edges):
        shown = sorted((cue for cue in cues if cue.start <= start < cue.end), key=lambda cue: -cue.line)
        if shown:
            text = "\n".join(cue.text.replace("-->", "→") for cue in shown)
            parts.append(f"{len(parts) + 1}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n")
    return "\n".join(parts)


def clock(milliseconds: int, mark: str) -> str:
    """Write milliseconds as `HH:MM:SS` with the rest after `mark`.

    Example:
        >>> clock(3_723_004, ",")
        '01:02:03,004'
    """
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{rest:03}"


def _shown(label: str) -> str:
    """Bring a class name onto one line of printable characters: an empty line would end the cue."""
    return " ".join(printable(" ".join(label.split())).split()) or "?"
