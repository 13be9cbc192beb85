"""Explain a detector's mAP: which kinds of false positives there are, and which annotated segments are missed.

After DETAD (Alwassel et al., "Diagnosing Error in Temporal Action Detectors", ECCV 2018). Looked at are, for each
class, its G best detections times `best` (G annotated segments), matched as in the ActivityNet protocol at one IoU a.
A detection that is no true positive is, by the annotated segment it overlaps most,

- `double detection`: right class, IoU >= a, but that segment is taken,
- `wrong label`: IoU >= a with a segment of another class,
- `localisation`: right class, 0.1 <= IoU < a,
- `confusion`: another class, 0.1 <= IoU < a,
- `background`: IoU < 0.1 with everything.

Its price is the gain: by how much the mAP would be higher if none of the looked at detections were of that kind.

Numpy only; the picture is SVG text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.truth import Annotations
from tensorkeep.detection.results.columns import Columns, align_names, gather_columns, guess_subset
from tensorkeep.detection.results.matching import Ints, Pairs, match_greedily, overlaps
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.overwriting import lone_file

# what a detection can be
KINDS = ("true positive", "double detection", "wrong label", "localisation", "confusion", "background")
_COLOURS = ("#4c9f70", "#7aa6c2", "#d98c5f", "#e3c567", "#b07aa1", "#9a9a9a")
_NAMES = ("XS", "S", "M", "L", "XL")
PICTURE = lone_file(
    "a picture of tensorkeep",
    r'<svg xmlns="http://www.w3.org/2000/svg" width="[\d.]+" height="[\d.]+" font-family="sans-serif" font-size="12">',
)
_LOOSE = 0.1  # below this overlap a detection is background


class ClassErrors(NamedTuple):
    """What the G best detections of one class are, G being its number of annotated segments.

    Attributes:
        label: its name.
        segments: annotated ones.
        missed: how many of these no detection, of any rank, was matched to.
        ap: average precision.
        kinds: how many detections are each of `KINDS`.
    """

    label: str
    segments: int
    missed: int
    ap: float
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class ErrorAnalysis:
    """What the detections are, and which annotated segments no detection meets.

    Attributes:
        tiou: the temporal IoU from which a detection meets a segment.
        kinds: [blocks, 6], share of each of `KINDS` among the first, second, ... G detections of each class.
        missed: rows (what, bin, annotated segments in it, share of them that is missed).
        notes: sentences on what has no counterpart.
        map: mean average precision at `tiou`, interpolated, over the classes of the subset.
        gains: [6], by how much `map` would be higher without the detections of each of `KINDS`; 0 of true positives.
        classes: the same by class, in order of their names.
    """

    tiou: float
    kinds: NDArray[np.float64]
    missed: tuple[tuple[str, str, int, float], ...]
    notes: tuple[str, ...] = ()
    map: float = 0.0
    gains: tuple[float, ...] = ()
    classes: tuple[ClassErrors, ...] = ()

    def table(self) -> list[list[str]]:
        """Return rows of text: the kinds for each block of G detections, then what is missed; figures in percent."""
        rows = [["detections", *KINDS]]
        rows += [[f"{i + 1}G", *(f"{100 * share:.1f}" for share in row)] for i, row in enumerate(self.kinds)]
        rows.append(["missed", "bin", "segments", "share"])
        rows += [[what, name, str(count), f"{100 * share:.1f}"] for what, name, count, share in self.missed]
        return rows

    def document(self) -> dict[str, object]:
        """Return the same as plain lists and dicts, for JSON."""
        return {
            "tiou": self.tiou,
            "kinds": [dict(zip(KINDS, row.tolist(), strict=True)) for row in self.kinds],
            "missed": [dict(zip(("what", "bin", "segments", "share"), row, strict=True)) for row in self.missed],
            "notes": list(self.notes),
            "mAP": self.map,
            "gains": dict(zip(KINDS, self.gains, strict=True)) if self.gains else {},
            "classes": [row._asdict() | {"kinds": dict(zip(KINDS, row.kinds, strict=True))} for row in self.classes],
        }

    def picture(self) -> str:
        """Draw one stacked bar for each block of G detections, as SVG text."""
        width, height, gap = 34, 200, 12
        left, total = 40, 40 + len(self.kinds) * (width + gap)
        parts = [f'<text x="{left}" y="14">false positives at tIoU {self.tiou:g}, by rank</text>']
        for i, row in enumerate(self.kinds):
            x, y = left + i * (width + gap), 24.0
            for share, colour, kind in zip(row, _COLOURS, KINDS, strict=True):
                parts.append(
                    f'<rect x="{x}" y="{y:.1f}" width="{width}" height="{share * height:.1f}" fill="{colour}">'
                    f"<title>{escape(kind)}: {100 * share:.1f} %</title></rect>"
                )
                y += share * height
            parts.append(f'<text x="{x + 6}" y="{height + 40}">{i + 1}G</text>')
        for i, (kind, colour) in enumerate(zip(KINDS, _COLOURS, strict=True)):
            parts.append(f'<rect x="{total + 16}" y="{28 + 20 * i}" width="12" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{total + 34}" y="{38 + 20 * i}">{escape(kind)}</text>')
        size = f'width="{total + 170}" height="{height + 56}"'
        body = "".join(parts)
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{body}</svg>'


def analyse_errors(
    annotations: Annotations,
    detections: DetectionTable,
    *,
    subset: str | None = None,
    blocked: Sequence[str] = (),
    tiou: float = 0.5,
    best: int = 10,
) -> ErrorAnalysis:
    """Sort detections into kinds of errors at one temporal IoU, and count the annotated segments that they miss.

    Missed segments are binned by length (fifths of this subset's segments, so that the bins suit any data set), by
    coverage (length over the video's duration, likewise, where durations are known) and by the number of segments of
    the same class in the video (1, 2 to 4, 5 to 8, more). A segment is missed when no detection, of any rank, was
    matched to it.

    Args:
        annotations: the ground truth.
        detections: what was found.
        subset: whose segments count; None: the one that most of the detections' videos belong to.
        blocked: names of videos to leave out on both sides.
        tiou: temporal IoU from which a detection meets a segment, 0.1 to 1.
        best: how many times G detections of each class are looked at, G being its number of annotated segments.

    Returns:
        The share of each kind of error, and of missed segments by bin.

    Raises:
        TensorkeepError: `tiou` is out of range, or there is nothing to score against, as in `evaluation.evaluate`.

    Example:
        >>> analyse_errors(read_annotations("gt.json"), read_detections("pred.json")).table()  # doctest: +SKIP
    """
    if not _LOOSE <= tiou <= 1:
        raise TensorkeepError(f"tiou {tiou} of an error analysis must lie between {_LOOSE} and 1")
    notes: list[str] = []
    annotations, detections = align_names(annotations, detections, notes)
    subset = subset if subset is not None else guess_subset(annotations, detections)
    columns = gather_columns(annotations, detections, subset, blocked, notes=notes)
    groups = columns.groups()
    order = np.lexsort((-columns.scores, groups))
    same = overlaps(columns.segments[order], groups[order], columns.true_segments, columns.true_groups(), _LOOSE)
    taken = match_greedily(
        same.left, same.right, same.iou, groups[order], np.array([tiou]), len(columns.true_segments), above=False
    )[:, 0]
    match = np.empty_like(taken)
    match[order] = taken
    chosen, block = _best_detections(columns, best)
    kind = _kinds(columns, chosen, match[chosen] >= 0, tiou)
    counts = np.zeros((best, len(KINDS)))
    np.add.at(counts, (block, kind), 1)
    met = np.zeros(len(columns.true_segments), dtype=bool)
    met[match[match >= 0]] = True
    counts = counts[: int(np.flatnonzero(counts.sum(axis=1)).max(initial=0)) + 1]  # blocks that nothing reaches
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    missed = tuple(_missed(annotations, subset, detections, columns, met))
    ap = _precision(columns, match >= 0)
    own = _by_class(columns, chosen[block == 0], kind[block == 0], met, ap)
    gains = _gains(columns, match >= 0, chosen, kind, float(ap.mean()))
    return ErrorAnalysis(tiou, shares, missed, tuple(notes), float(ap.mean()), gains, own)


def _gains(columns: Columns, hit: NDArray[np.bool_], chosen: Ints, kind: Ints, now: float) -> tuple[float, ...]:
    """Return by how much the mAP rises without the chosen detections of each kind."""
    found = [0.0]
    for number in range(1, len(KINDS)):
        taken = np.ones(len(hit), dtype=bool)
        taken[chosen[kind == number]] = False
        found.append(float(_precision(columns, hit, taken).mean()) - now)
    return tuple(found)


def _precision(columns: Columns, hit: NDArray[np.bool_], taken: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Return [C] average precision, interpolated, of the detections that are taken (all of them without)."""
    total = np.bincount(columns.true_labels, minlength=len(columns.classes))
    order = np.lexsort((-columns.scores, columns.labels))
    order = order[columns.labels[order] >= 0] if taken is None else order[(columns.labels >= 0)[order] & taken[order]]
    bounds = np.searchsorted(columns.labels[order], np.arange(len(columns.classes) + 1))
    ap = np.zeros(len(columns.classes))
    for number, (first, last) in enumerate(pairwise(bounds.tolist())):
        found = hit[order[first:last]]
        precision = np.cumsum(found) / np.arange(1, len(found) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        ap[number] = precision[found].sum() / total[number]
    return ap


def _by_class(
    columns: Columns, best: Ints, kind: Ints, met: NDArray[np.bool_], ap: NDArray[np.float64]
) -> tuple[ClassErrors, ...]:
    """Count the kinds of the G best detections of each class, and its missed segments."""
    counts = np.zeros((len(columns.classes), len(KINDS)), dtype=np.int64)
    np.add.at(counts, (columns.labels[best], kind), 1)
    total = np.bincount(columns.true_labels, minlength=len(columns.classes))
    found = np.bincount(columns.true_labels[met], minlength=len(columns.classes))
    rows = zip(columns.classes, total.tolist(), (total - found).tolist(), ap.tolist(), counts.tolist(), strict=True)
    return tuple(ClassErrors(name, own, lost, value, tuple(kinds)) for name, own, lost, value, kinds in rows)


def _best_detections(columns: Columns, best: int) -> tuple[Ints, Ints]:
    """Return the `best` x G best detections of every class, and the block 0..best-1 in which each falls."""
    total = np.bincount(columns.true_labels, minlength=len(columns.classes))
    order = np.lexsort((-columns.scores, columns.labels))
    order = order[columns.labels[order] >= 0]
    labels = columns.labels[order]
    block = (np.arange(len(order)) - np.searchsorted(labels, labels)) // total[labels]
    inside = block < best
    return order[inside], block[inside]


def _kinds(columns: Columns, chosen: Ints, true: NDArray[np.bool_], tiou: float) -> Ints:
    """Return the place in `KINDS` of each chosen detection.

    The segment of the highest IoU decides; of equal ones, that of the right class.
    """
    pairs: Pairs = overlaps(
        columns.segments[chosen], columns.videos[chosen], columns.true_segments, columns.true_videos, _LOOSE
    )
    right = columns.true_labels[pairs.right] == columns.labels[chosen][pairs.left]
    top = np.lexsort((right, pairs.iou, pairs.left))  # the last of each detection is its best
    last = top[np.flatnonzero(np.diff(pairs.left[top], append=-1))]
    kind = np.full(len(chosen), KINDS.index("background"))
    near, own = pairs.iou[last] >= tiou, right[last]
    names = np.where(near, np.where(own, 1, 2), np.where(own, 3, 4))
    kind[pairs.left[last]] = names
    kind[true] = 0
    return kind


def _missed(
    annotations: Annotations, subset: str, detections: DetectionTable, columns: Columns, met: NDArray[np.bool_]
) -> list[tuple[str, str, int, float]]:
    """Return rows (what, bin, segments, share missed) for length, coverage and crowding."""
    length = columns.true_segments[:, 1] - columns.true_segments[:, 0]
    videos = annotations.of_subset(subset)
    numbered = sorted({*detections.video_names, *(video.name for video in videos)})
    durations = np.array(
        [annotations.videos[n].duration or np.nan if n in annotations.videos else np.nan for n in numbered]
    )
    coverage = length / durations[columns.true_videos]
    groups = columns.true_groups()
    crowd = np.unique(groups, return_counts=True)[1][np.unique(groups, return_inverse=True)[1].ravel()]
    rows = []
    for what, values in (("length s", length), ("coverage", coverage)):
        known = np.isfinite(values)
        if not known.any():
            continue
        edges = np.quantile(values[known], np.linspace(0, 1, 6))
        bins = np.clip(np.searchsorted(edges[1:-1], values, side="left"), 0, 4)
        for number, name in enumerate(_NAMES):
            inside = known & (bins == number)
            if inside.any():
                span = f"{name} ({edges[number]:.3g} to {edges[number + 1]:.3g}]"
                rows.append((what, span, int(inside.sum()), float(1 - met[inside].mean())))
    for low, high, name in ((1, 1, "1"), (2, 4, "2 to 4"), (5, 8, "5 to 8"), (9, np.inf, "9 and more")):
        inside = (crowd >= low) & (crowd <= high)
        if inside.any():
            rows.append(("same class in video", name, int(inside.sum()), float(1 - met[inside].mean())))
    return rows
