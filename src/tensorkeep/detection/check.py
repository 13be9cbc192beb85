"""Check a detection recipe's data before the first update: what its annotations say against files and grid.

Training on annotations in frames, on swapped ends or on actions shorter than a grid step runs without an error, and
teaches nothing. Here every action of the training videos is placed on the feature grid as a sample places it, and the
points of each level of the pyramid that may learn it are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tensorkeep.detection.data.annotation_checks import check_annotations
from tensorkeep.detection.data.clips import Clips
from tensorkeep.detection.data.item import Item, frame_positions, resized_positions
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.readers import FeatureReader, WindowConfig
from tensorkeep.detection.data.truth import Annotations
from tensorkeep.detection.data.windows import count_snippets
from tensorkeep.detection.model.assignment import assign_targets
from tensorkeep.detection.model.config import HeadConfig
from tensorkeep.errors import TensorkeepError

Floats = NDArray[np.float64]
LOST = "cannot be learned"  # kind of the problems that name actions nothing can learn
_UNITS = ((1000.0, "milliseconds", "divide by 1000"), (None, "frames", "divide by the frame rate"))


class Checked(NamedTuple):
    """What a check of training data found.

    Attributes:
        problems: what cannot be learned first, then errors.
        videos: how many are trained on.
        actions: how many they show.
        lost: how many of these no point can learn.
        levels: expected points of an epoch that learn an action, for each level of the pyramid.
        cache: what decoded frames that are kept take, and how many are; "" where none are.
    """

    problems: tuple[Problem, ...]
    videos: int
    actions: int
    lost: int
    levels: tuple[float, ...]
    cache: str = ""

    def document(self) -> dict[str, Any]:
        """Return the same as plain lists and dicts, for JSON."""
        return {
            "videos": self.videos,
            "actions": self.actions,
            "actions_that_nothing_can_learn": self.lost,
            "expected_positives": list(self.levels),
            "problems": [problem._asdict() for problem in self.problems],
            **({"cache": self.cache} if self.cache else {}),
        }


def check_training(
    clips: Clips, annotations: Annotations, subsets: Sequence[str], classes: Sequence[str], head: HeadConfig
) -> Checked:
    """Check what a detector is to be trained on.

    Args:
        clips: the training data, as `read_clips` gives it.
        annotations: the file that it comes from.
        subsets: those that training and evaluation ask for.
        classes: names of the detector's classes, in label order.
        head: strides, ranges and radius of its pyramid.

    Returns:
        What is odd, and what can be learned.

    Example:
        >>> check_training(clips, annotations, ("training", "validation"), classes, recipe.model.head)  # doctest: +SKIP
        Checked(problems=(), videos=200, actions=3007, lost=0, levels=(3102.0, ...))
    """
    problems = [p for p in _of_annotations(annotations, subsets, classes) if p.severity != "info"]
    levels, lost, actions = np.zeros(len(head.strides)), 0, 0
    for item in clips.items:
        problems += _of_features(item, clips)
        found = _of_actions(item, clips.window, head)
        actions += len(found)
        bad = [(number, why) for number, (why, _) in enumerate(found) if why]
        lost += len(bad)
        levels += sum((each for _, each in found), np.zeros(len(head.strides)))
        said = annotations.videos[item.name].duration if item.name in annotations.videos else None
        problems += _told(item, bad, len(found), classes, said)
    ordered = tuple(sorted(problems, key=lambda problem: (problem.kind != LOST, problem.severity != "error")))
    return Checked(ordered, len(clips.items), actions, lost, tuple(map(float, levels)))


def unusable_annotations(
    annotations: Annotations, subsets: Sequence[str], classes: Sequence[str]
) -> tuple[Problem, ...]:
    """Return what is odd about annotations that no data set can be made of: labels outside of the class map.

    Args:
        annotations: the file.
        subsets: those that are asked for.
        classes: names of the detector's classes.

    Returns:
        All that is odd, errors first; nothing where the labels fit.
    """
    found = [p for p in _of_annotations(annotations, subsets, classes) if p.severity != "info"]
    if not any(problem.kind == "label not in the map" for problem in found):
        return ()
    what = "files and grid are not looked at before the labels fit"
    return (
        *sorted(found, key=lambda problem: problem.severity != "error"),
        Problem("warning", "not checked", None, what),
    )


def refuse_untrainable(checked: Checked, where: str) -> None:
    """Refuse a run that can learn nothing.

    Args:
        checked: what `check_training` gave.
        where: the annotation file.

    Raises:
        TensorkeepError: No action can be learned; the message names the first reasons.
    """
    if checked.actions and checked.lost == checked.actions:
        reasons = [f"{p.video}: {p.message}" for p in checked.problems if p.kind == LOST]
        what = f"none of the {checked.actions} actions can be learned; {'; '.join(reasons[:3])}"
        raise TensorkeepError(what, where=where, hint="tensorkeep check detection RECIPE shows all of it")


def _of_annotations(annotations: Annotations, subsets: Sequence[str], classes: Sequence[str]) -> Iterator[Problem]:
    """What is odd about the annotations of some subsets; a kind of a video comes once, with a count."""
    inside = {name for name, video in annotations.videos.items() if video.subset in subsets}
    there = [subset for subset in dict.fromkeys(subsets) if subset in annotations.subsets()]
    found = check_annotations(annotations, subsets=there, class_map=classes)
    first = {(p.kind, p.video): p for p in reversed(found) if p.video is None or p.video in inside}
    many = Counter((p.kind, p.video) for p in found)
    for key, problem in first.items():
        if problem.kind in ("class without segments", "unknown subset"):
            continue
        more = f" (and {many[key] - 1} more of this video)" if many[key] > 1 else ""
        yield problem._replace(message=problem.message + more)


def _of_features(item: Item, clips: Clips) -> Iterator[Problem]:
    """Compare the rows of a feature file with the frames that its annotation counts."""
    if not isinstance(clips.reader, FeatureReader) or clips.window.method == "resize":
        return
    stride, frames = clips.window.snippet_stride, item.frames
    if abs(item.steps * stride - frames) > max(0.1 * frames, 32 + stride):  # a clip of 32 frames may end a file earlier
        message = (
            f"{item.steps} rows of features at {stride} frames each are {item.steps * stride} frames, the annotation "
            f"counts {frames}: a row is about {frames / max(item.steps, 1):.1f} frames (data.feature_stride, data.fps)"
        )
        yield Problem("error", "feature stride", item.name, message)


def _of_actions(item: Item, window: WindowConfig, head: HeadConfig) -> list[tuple[str, Floats]]:
    """Return of every action of a video why nothing can learn it ("" where something can), and its points [levels]."""
    steps = (
        window.window_size
        if window.method == "resize"
        else item.steps or count_snippets(item.frames, window.snippet_stride)
    )
    return [_of_action(item, number, row, steps, window, head) for number, row in enumerate(_on_grid(item, window))]


def _on_grid(item: Item, window: WindowConfig) -> Floats:
    """Return the segments [N, 2] of a video in grid steps, as a training sample places them."""
    if window.method == "resize":
        return resized_positions(item, window.window_size)
    found: Floats = (frame_positions(item) - window.offset_frames) / window.snippet_stride
    return found


def _of_action(
    item: Item, number: int, row: Floats, steps: int, window: WindowConfig, head: HeadConfig
) -> tuple[str, Floats]:
    """Return why nothing can learn an action ("" where something can), and the points expected to, by level."""
    none, (start, end) = np.zeros(len(head.strides)), row.tolist()
    first, last = item.segments[number].tolist()
    if last < first:
        return "its end comes before its start", none
    if first >= item.duration > 0 or start >= steps:
        return f"it starts at {first:g} s, the video ends at {item.duration:.2f} s", none
    step = item.duration * (window.snippet_stride / item.frames if window.method != "resize" else 1 / steps)
    short = f"it lasts {last - first:.3g} s, one step of the grid is {step:.3g} s"
    if end <= start:
        return short, none
    shown = min(end, steps) - max(start, 0.0)
    held = min(shown, window.window_size)
    if window.method == "random_trunc" and held < window.trunc_thresh * (end - start):
        if shown < window.trunc_thresh * (end - start):
            return f"it ends at {last:g} s, the video at {item.duration:.2f} s", none
        return f"it lasts {end - start:.0f} steps of the grid, a window has {window.window_size}", none
    start, end = max(start, 0.0), max(start, 0.0) + held
    fixed = window.method == "resize" or (steps <= window.window_size and window.crop_ratio is None)
    levels = _points(start, end, steps, fixed, head)
    if levels.any():
        return "", levels
    return (short if end - start < 1 else f"no point of the pyramid fits its {end - start:.3g} steps"), levels


def _points(start: float, end: float, steps: int, fixed: bool, head: HeadConfig) -> Floats:
    """Return how many points of each level learn a segment alone, in grid steps; the mean over all places of a window.

    A window begins at any step, so that a point of stride s may lie at every step, one time in s; where windows begin
    with the video (`fixed`) points lie at multiples of s.
    """
    found = []
    for stride, (low, high) in zip(head.strides, head.ranges, strict=True):
        jump = stride if fixed else 1
        begin, stop = int(max(start - stride - 1, 0)) // jump * jump, int(min(end + stride + 2, max(steps, end)))
        times = torch.arange(begin, max(stop, begin) + 1, jump, dtype=torch.float64)
        times = times + (0.5 * stride if head.point_offset else 0.0)
        points = torch.stack([times, *(torch.full_like(times, float(v)) for v in (low, high, stride))], 1)
        segment = torch.tensor([[start, end]], dtype=torch.float64)
        learned, _ = assign_targets(points, segment, torch.zeros(1, dtype=torch.long), 1, head.centre_radius)
        found.append(float(learned.sum()) / (1 if fixed else stride))
    return np.array(found)


def _told(
    item: Item, bad: Sequence[tuple[int, str]], actions: int, classes: Sequence[str], said: float | None
) -> Iterator[Problem]:
    """Say which actions of a video cannot be learned: how many, the first, and what unit they may be in.

    Where the annotation's own duration (`said`) is another, the file is at fault, which is told of it.
    """
    if not bad:
        return
    number, why = bad[0]
    start, end = item.segments[number].tolist()
    label = classes[int(item.labels[number])] if int(item.labels[number]) < len(classes) else "?"
    same = said is None or abs(said - item.duration) <= 0.1 * item.duration
    unit = _unit(item) if why.startswith("it starts at") and same else ""
    message = f"{len(bad)} of {actions} actions cannot be learned, first {label!r} [{start:g}, {end:g}]: {why}"
    yield Problem("error" if len(bad) == actions else "warning", LOST, item.name, message + unit)


def _unit(item: Item) -> str:
    """Say what the times of a video look like where they lie past its end."""
    rate = item.frames / item.duration if item.duration > 0 else 0.0
    reach = float(item.segments.max()) / item.duration if item.duration > 0 else 0.0
    for factor, name, remedy in _UNITS:
        each = rate if factor is None else factor
        if each and 0.3 * each <= reach <= 1.05 * each:
            return f"; the times look like {name}: {remedy}"
    return ""
