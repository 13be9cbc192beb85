"""Non-maximum suppression of temporal segments: gaussian, linear, hard and adaptive soft-NMS, greedy NMS, voting.

Everything is batched: detections of many videos and classes are suppressed together, group by group, as rows of
padded float32 matrices whose columns are the turns of the algorithm. Numpy only, no compiler.

A turn of soft-NMS takes the highest score of a group (the first in the row if several are equal) and multiplies every
other score by a weight of its overlap o with the taken segment, lengths being end - start + 1e-6:

- gaussian: exp(-o^2 / sigma); adaptive: the same where o >= t1 + t2 * (length of the taken segment), else 1
- linear: 1 - o where o >= iou, else 1; hard: 0 where o >= iou, else 1

(Bodla et al. 2017; OpenTAD's numbers 2, 3, 1, 0.) Scores below `min_score` are dropped. `greedy` is classical NMS:
segments that overlap a kept one with o >= iou go, scores stay, those not above `min_score` (> 0) go first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.results._suppression import PaddedGroups, pad_groups, run_greedy, run_soft
from tensorkeep.errors import TensorkeepError, near_misses

METHODS = ("gaussian", "linear", "hard", "adaptive", "greedy")
_OPENTAD_METHODS = {0: "hard", 1: "linear", 2: "gaussian", 3: "adaptive"}
_BLOCK = 1 << 16  # elements of one padded matrix: few calls, and the matrices stay in a core's cache

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Detections(NamedTuple):
    """N detections of one video or window.

    Attributes:
        segments: [N, 2] float32, start and end in grid steps or seconds.
        scores: [N] float32.
        labels: [N] int64, class numbers.
    """

    segments: Floats
    scores: Floats
    labels: Ints


@dataclass(frozen=True)
class Suppression:
    """How detections are suppressed; the module gives the formulas.

    Attributes:
        method: "gaussian", "linear", "hard", "adaptive" or "greedy".
        sigma: width of the gaussian.
        iou: overlap from which "linear", "hard" and "greedy" act.
        t1, t2: of "adaptive".
        min_score: scores below it are dropped.
        limit: most detections kept of a video.
        multiclass: whether each class is suppressed on its own, else all classes of a video together.
        voting: IoU from which the original segments of the same group pull a kept one towards their score-weighted
            mean; None: no voting.
    """

    method: str = "gaussian"
    sigma: float = 0.5
    iou: float = 0.0
    t1: float = 0.0
    t2: float = 0.0
    min_score: float = 0.0
    limit: int = 100
    multiclass: bool = True
    voting: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            hint = near_misses(self.method, METHODS) or f"one of {', '.join(METHODS)}"
            raise TensorkeepError(f"unknown suppression method {self.method!r}", hint=hint)
        if self.sigma <= 0 or self.limit < 1:
            raise TensorkeepError(f"sigma {self.sigma} must be above 0 and limit {self.limit} at least 1")
        if self.voting is not None and not 0 < self.voting <= 1:
            raise TensorkeepError(f"voting {self.voting} must be an IoU in (0, 1]", hint="None switches it off")


def from_opentad(config: Mapping[str, object]) -> Suppression:
    """Return the rule that an OpenTAD `nms=dict(...)` asks for, with OpenTAD's defaults and *effects*.

    OpenTAD ignores `voting_thresh` when `multiclass` is on; so does the rule made here, while a `Suppression` with
    both does vote within each class.

    Raises:
        TensorkeepError: A key or method is not OpenTAD's.

    Example:
        >>> from_opentad({"use_soft_nms": True, "sigma": 0.7, "max_seg_num": 2000}).limit
        2000
    """
    defaults: dict[str, float] = {
        "iou_threshold": 0.0,
        "min_score": 0.0,
        "max_seg_num": 100,
        "use_soft_nms": True,
        "multiclass": True,
        "sigma": 0.5,
        "voting_thresh": 0.0,
        "method": 2,
        "t1": 0.0,
        "t2": 0.0,
    }
    values = dict(defaults)
    for key, value in config.items():
        if key not in defaults or not isinstance(value, int | float):
            hint = near_misses(key, defaults) or f"keys: {', '.join(defaults)}"
            raise TensorkeepError(f"no OpenTAD nms option {key}={value!r}", hint=hint)
        values[key] = value
    number = int(values["method"])
    if number not in _OPENTAD_METHODS:
        raise TensorkeepError(f"OpenTAD nms method {number} is none of 0, 1, 2, 3")
    multiclass, voting = bool(values["multiclass"]), float(values["voting_thresh"])
    return Suppression(
        method=_OPENTAD_METHODS[number] if values["use_soft_nms"] else "greedy",
        sigma=float(values["sigma"]),
        iou=float(values["iou_threshold"]),
        t1=float(values["t1"]),
        t2=float(values["t2"]),
        min_score=float(values["min_score"]),
        limit=int(values["max_seg_num"]),
        multiclass=multiclass,
        voting=voting if voting > 0 and not multiclass else None,
    )


def suppress(detections: Detections, rule: Suppression) -> Detections:
    """Suppress one video's detections; those that are left come by falling score, at most `rule.limit`.

    Raises:
        TensorkeepError: The columns do not fit each other, or a score is negative or no number.

    Example:
        >>> segments, scores = np.array([[0, 2], [0, 2]], np.float32), np.array([0.5, 0.25], np.float32)
        >>> one = Detections(segments, scores, np.array([3, 3]))
        >>> suppress(one, Suppression(method="greedy", iou=0.5)).scores
        array([0.5], dtype=float32)
    """
    return suppress_videos(detections, np.zeros(len(detections.scores), dtype=np.int64), rule)[0]


def suppress_videos(detections: Detections, videos: Ints, rule: Suppression) -> tuple[Detections, Ints]:
    """Suppress the detections of many videos at once.

    Args:
        detections: of all videos together.
        videos: [N] number of the video of each detection.
        rule: how they are suppressed.

    Returns:
        The kept detections by video, then falling score, and their video numbers.

    Raises:
        TensorkeepError: As `suppress` does.
    """
    segments = np.asarray(detections.segments, dtype=np.float32)
    scores = np.asarray(detections.scores, dtype=np.float32)
    labels, videos = np.asarray(detections.labels, dtype=np.int64), np.asarray(videos, dtype=np.int64)
    _check_columns(segments, scores, labels, videos)
    empty = np.zeros(0, dtype=np.int64)
    if not len(scores):
        return Detections(segments, scores, labels), empty
    groups, members, sizes = _group(videos, labels if rule.multiclass else None)
    index, kept_scores = _run_groups(segments, scores, members, sizes, rule)
    kept_segments = segments[index]
    if rule.voting is not None:
        kept_segments = _vote(kept_segments, index, segments, scores, groups, members, sizes, rule.voting)
    order = np.lexsort((-kept_scores, videos[index]))
    owner = videos[index][order]
    order = order[np.arange(len(order)) - np.searchsorted(owner, owner) < rule.limit]
    kept = Detections(kept_segments[order], kept_scores[order], labels[index[order]])
    return kept, videos[index[order]]


def vote(kept: Floats, segments: Floats, scores: Floats, iou: float) -> Floats:
    """Move kept segments [K, 2] to the mean of all `segments` [N, 2] with IoU >= `iou`, weighted by `scores` [N].

    A kept segment without any neighbour (it has no length) stays where it is.

    Example:
        >>> kept, segments = np.array([[0, 4]], np.float32), np.array([[0, 4], [1, 4]], np.float32)
        >>> vote(kept, segments, np.ones(2, np.float32), 0.5)
        array([[0.5, 4. ]], dtype=float32)
    """
    shared = np.minimum(kept[:, None, 1], segments[None, :, 1]) - np.maximum(kept[:, None, 0], segments[None, :, 0])
    shared = np.maximum(shared, 0, out=shared)
    union = (kept[:, 1] - kept[:, 0])[:, None] + (segments[:, 1] - segments[:, 0])[None, :] - shared
    near = (union > 0) & (shared / np.where(union > 0, union, np.float32(1)) >= np.float32(iou))
    weights = np.where(near, scores[None, :], np.float32(0))
    total = weights.sum(axis=1, keepdims=True, dtype=np.float64)  # float64: the order of summation leaves no trace
    mean = (weights.astype(np.float64) @ segments.astype(np.float64)) / np.where(total > 0, total, 1)
    return np.where(total > 0, mean, kept).astype(np.float32)


def _check_columns(segments: Floats, scores: Floats, labels: Ints, videos: Ints) -> None:
    """Raise TensorkeepError where columns do not fit each other or hold what is no number."""
    number = len(scores)
    if segments.shape != (number, 2) or scores.ndim != 1 or labels.shape != (number,) or videos.shape != (number,):
        raise TensorkeepError(
            f"detections do not fit: segments {segments.shape}, scores {scores.shape}, labels {labels.shape}, "
            f"videos {videos.shape}",
            hint="segments [N, 2], the others [N]",
        )
    if not np.isfinite(segments).all() or not (np.isfinite(scores) & (scores >= 0)).all():
        raise TensorkeepError("detections with a score below 0, or with a score or segment that is not finite")


def _group(videos: Ints, labels: Ints | None) -> tuple[Ints, Ints, Ints]:
    """Group detections by video, and by class where `labels` are given.

    Returns:
        The group of each detection [N], the detections group by group [N] in their order, and the groups' sizes.
    """
    keys = np.unique(videos, return_inverse=True)[1].ravel()
    if labels is not None:
        names, classes = np.unique(labels, return_inverse=True)
        keys = keys * len(names) + classes.ravel()
    members = np.argsort(keys, kind="stable")
    heads = np.flatnonzero(np.diff(keys[members], prepend=-1))
    sizes = np.diff(heads, append=len(keys))
    groups = np.empty(len(keys), dtype=np.int64)
    groups[members] = np.repeat(np.arange(len(sizes)), sizes)
    return groups, members, sizes


def _run_groups(segments: Floats, scores: Floats, members: Ints, sizes: Ints, rule: Suppression) -> tuple[Ints, Floats]:
    """Return indices and new scores of the kept detections; groups of similar size share a padded matrix."""
    starts = np.cumsum(sizes) - sizes
    by_size = np.argsort(-sizes, kind="stable")
    kept: list[tuple[Ints, Floats]] = []
    first = 0
    while first < len(by_size):
        rows = max(1, _BLOCK // int(sizes[by_size[first]]))
        chosen = by_size[first : first + rows]
        block = pad_groups(segments, scores, members, starts[chosen], sizes[chosen])
        kept.append(_run_block(block, rule))
        first += rows
    return np.concatenate([index for index, _ in kept]), np.concatenate([score for _, score in kept])


def _run_block(block: PaddedGroups, rule: Suppression) -> tuple[Ints, Floats]:
    """Suppress the groups of one padded matrix."""
    if rule.method == "greedy":
        return run_greedy(block, rule.iou, rule.min_score, rule.limit)
    return run_soft(block, rule.method, (rule.sigma, rule.iou, rule.t1, rule.t2), rule.min_score, rule.limit)


def _vote(
    kept: Floats, index: Ints, segments: Floats, scores: Floats, groups: Ints, members: Ints, sizes: Ints, iou: float
) -> Floats:
    """Apply `vote` within each group."""
    ends = np.cumsum(sizes)
    moved = kept.copy()
    order = np.argsort(groups[index], kind="stable")
    owners = groups[index][order]
    for part in np.split(order, np.flatnonzero(np.diff(owners)) + 1):
        group = groups[index[part[0]]]
        everyone = members[ends[group] - sizes[group] : ends[group]]
        moved[part] = vote(kept[part], segments[everyone], scores[everyone], iou)
    return moved
