"""Turn a detector's outputs into detections in seconds: decode, select, convert times, merge windows, fuse classes.

The steps of a video: `decode_offsets` -> `select_candidates` -> (one clip a video: `nms.suppress` on the grid) ->
`sliding_seconds` or `resized_seconds` -> (sliding windows: `merge_windows`) -> (class-agnostic head: `fuse_classes`).

OpenTAD rounds times to 2 and scores to 4 decimals *before* windows are merged, which makes scores equal that were not
and turns those below 5e-5 into 0. Here numbers are rounded only where they are written (`results.write_detections`);
`round_detections` is the switch for those who need OpenTAD's published numbers to the last digit. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tensorkeep.detection.results.nms import Detections, Floats, Ints, Suppression, suppress
from tensorkeep.errors import TensorkeepError


def decode_offsets(points: Floats, offsets: Floats) -> Floats:
    """Turn offsets at points into segments on the grid: start = time - stride * left, end = time + stride * right.

    Args:
        points: [P, 4] (time, range low, range high, stride) in grid steps.
        offsets: [P, 2] (left, right) in strides.

    Returns:
        [P, 2] in grid steps.

    Example:
        >>> decode_offsets(np.array([[8, 0, 4, 2]], np.float32), np.array([[1, 3]], np.float32))
        array([[ 6., 14.]], dtype=float32)
    """
    time, stride = points[:, :1], points[:, 3:4]
    return np.concatenate([time - stride * offsets[:, :1], time + stride * offsets[:, 1:]], axis=1)


def select_candidates(proposals: Floats, scores: Floats, threshold: float = 1e-3, limit: int = 2000) -> Detections:
    """Make a detection of every (proposal, class) whose score is above `threshold`, and keep the best `limit`.

    A head of one class (K = 1) finds actions without telling them apart: all its N proposals are kept, in order and
    with label 0, as OpenTAD does. Otherwise the result falls in score; equal scores keep their order.

    Args:
        proposals: [N, 2] segments, or [N, K, 2] where each class has its own.
        scores: [N, K].
        threshold: least score, itself excluded.
        limit: most detections.

    Raises:
        TensorkeepError: The shapes do not fit each other.

    Example:
        >>> select_candidates(np.array([[0, 4]], np.float32), np.array([[0.2, 0.0]], np.float32)).labels
        array([0])
    """
    if scores.ndim != 2 or proposals.shape not in ((len(scores), 2), (*scores.shape, 2)):
        raise TensorkeepError(
            f"proposals {proposals.shape} and scores {scores.shape} are not [N, 2] or [N, K, 2] and [N, K]"
        )
    number = scores.shape[1]
    if number == 1:
        return Detections(proposals.reshape(-1, 2), scores[:, 0], np.zeros(len(scores), dtype=np.int64))
    flat = scores.ravel()
    above = np.flatnonzero(flat > np.float32(threshold))
    best = above[np.argsort(-flat[above], kind="stable")[:limit]]
    own = proposals.reshape(-1, 2)[best] if proposals.ndim == 3 else proposals[best // number]
    return Detections(own, flat[best], best % number)


def sliding_seconds(
    segments: Floats,
    *,
    fps: float,
    duration: float,
    snippet_stride: float,
    window_start: float = 0.0,
    offset: float = 0.0,
) -> Floats:
    """Turn grid steps of a window into seconds within the video.

    seconds = (step * snippet_stride + window_start + offset) / fps

    Args:
        segments: [N, 2] in grid steps of the window.
        fps: frames / duration of the annotation.
        duration: seconds.
        snippet_stride: frames of a grid step.
        window_start: first frame of the window.
        offset: frames by which grid step 0 lies after it.

    Returns:
        [N, 2] in seconds, float32.

    Example:
        >>> sliding_seconds(np.array([[0, 5]], np.float32), fps=10, duration=100, snippet_stride=4, window_start=20)
        array([[2., 4.]], dtype=float32)
    """
    if fps <= 0 or duration <= 0:
        raise TensorkeepError(f"fps {fps} and duration {duration} must be above 0")
    frames = segments.astype(np.float32) * np.float32(snippet_stride) + np.float32(window_start + offset)
    times: Floats = np.clip(frames / np.float32(fps), np.float32(0), np.float32(duration))
    return times


def resized_seconds(segments: Floats, *, duration: float, length: int) -> Floats:
    """Turn grid steps [N, 2] of a video resized to `length` steps into seconds: step / length * duration.

    Example:
        >>> resized_seconds(np.array([[48, 200]], np.float32), duration=10, length=96)
        array([[ 5., 10.]], dtype=float32)
    """
    if length < 1 or duration <= 0:
        raise TensorkeepError(f"length {length} must be at least 1 and duration {duration} above 0")
    times = segments.astype(np.float32) / np.float32(length) * np.float32(duration)
    inside: Floats = np.clip(times, np.float32(0), np.float32(duration))
    return inside


def round_detections(detections: Detections, time_decimals: int = 2, score_decimals: int = 4) -> Detections:
    """Round times and scores, for OpenTAD's published numbers only (see the module).

    Half goes to the even digit of the exact float32 value, as Python's `round` does.
    """
    return Detections(
        np.round(detections.segments.astype(np.float64), time_decimals).astype(np.float32),
        np.round(detections.scores.astype(np.float64), score_decimals).astype(np.float32),
        detections.labels,
    )


def merge_windows(windows: Sequence[Detections], rule: Suppression) -> Detections:
    """Put the detections of a video's windows (in seconds) together and suppress them as one."""
    if not windows:
        return Detections(
            np.zeros((0, 2), dtype=np.float32), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        )
    segments, scores, labels = (np.concatenate(column) for column in zip(*windows, strict=True))
    return suppress(Detections(segments, scores, labels), rule)


def fuse_classes(detections: Detections, probabilities: Floats, top: int, rule: str = "product") -> Detections:
    """Copy the detections of a class-agnostic head for each of the video's `top` classes, class after class.

    Args:
        detections: N of one video.
        probabilities: [K] of a video classifier, in label order.
        top: number of classes.
        rule: "product" (CUHK for ActivityNet, UntrimmedNet for THUMOS) gives score * p; "geometric" (OpenTAD's Standard
            classifier) gives sqrt(score * p).

    Returns:
        top * N detections.

    Raises:
        TensorkeepError: The rule is unknown, or `top` is not between 1 and K.

    Example:
        >>> one = Detections(np.zeros((1, 2), np.float32), np.array([0.5], np.float32), np.array([0]))
        >>> fuse_classes(one, np.array([0.1, 0.9]), top=1).labels
        array([1])
    """
    if rule not in ("product", "geometric"):
        raise TensorkeepError(f"unknown fusion rule {rule!r}", hint="product or geometric")
    if probabilities.ndim != 1 or not 1 <= top <= len(probabilities):
        raise TensorkeepError(f"top {top} of class probabilities {probabilities.shape}: not between 1 and their number")
    chosen: Ints = np.argsort(-probabilities, kind="stable")[:top]
    scores = np.outer(probabilities[chosen].astype(np.float32), detections.scores)
    if rule == "geometric":
        scores = np.sqrt(scores)
    number = len(detections.scores)
    return Detections(np.tile(detections.segments, (top, 1)), scores.ravel(), np.repeat(chosen, number))
