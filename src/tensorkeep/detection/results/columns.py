"""Bring annotations and detections into columns over the same video and class numbers, for an evaluation.

Also decides what comes before: which subset is meant, which videos are left out, and which names mean the same video.
Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tensorkeep.detection.data.truth import AMBIGUOUS, Annotations, Video, unique_segments
from tensorkeep.detection.results.matching import Floats, Ints
from tensorkeep.detection.results.results import DetectionTable
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import read_json, read_text


class Columns(NamedTuple):
    """Annotated segments and detections of one evaluation as columns over the same video and class numbers."""

    classes: tuple[str, ...]
    true_segments: Floats  # [G, 2]
    true_videos: Ints  # [G]
    true_labels: Ints  # [G]
    segments: Floats  # [N, 2]
    videos: Ints  # [N]
    labels: Ints  # [N]; -1 for a label that no annotated segment has
    scores: Floats  # [N]
    ambiguous_segments: Floats  # [A, 2]
    ambiguous_videos: Ints  # [A]

    def true_groups(self) -> Ints:
        """Return [G] numbers that are equal where video and class are."""
        groups: Ints = self.true_videos * len(self.classes) + self.true_labels
        return groups

    def groups(self) -> Ints:
        """Return the same numbers [N] for the detections; negative for an unknown label."""
        return np.where(self.labels < 0, -1, self.videos * len(self.classes) + self.labels)


def gather_columns(
    annotations: Annotations,
    detections: DetectionTable,
    subset: str,
    blocked: Sequence[str] = (),
    *,
    clean: bool = True,
    notes: list[str] | None = None,
) -> Columns:
    """Bring the annotated segments of a subset and the detections into columns over common numbers.

    Args:
        annotations: the ground truth; segments labelled `Ambiguous` are set aside, they are no class.
        detections: what was found.
        subset: whose segments count.
        blocked: names of videos to leave out on both sides.
        clean: whether segments without length and repetitions are dropped (the ActivityNet protocol).
        notes: gets a sentence for all that has no counterpart on the other side.

    Raises:
        TensorkeepError: No annotated segment is left.
    """
    notes = [] if notes is None else notes
    left_out = set(blocked)
    own_videos = [video for video in annotations.of_subset(subset) if video.name not in left_out]
    names_there = sorted({*detections.video_names, *(video.name for video in own_videos)})
    numbers = {name: number for number, name in enumerate(names_there)}  # sorted: the kit's order between equal scores
    segments, videos, names = _stack_segments(own_videos, numbers, clean)
    aside = np.array([name == AMBIGUOUS for name in names], dtype=bool)
    classes = tuple(sorted({name for name, out in zip(names, aside, strict=True) if not out}))
    if not classes:
        raise TensorkeepError(
            f"no annotated segment in subset {subset!r}, so there is nothing to score against",
            where=annotations.source,
            hint=f"subsets there: {', '.join(annotations.subsets())}",
        )
    place = {name: number for number, name in enumerate(classes)}
    labels = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    found_in = np.array([numbers[name] for name in detections.video_names], dtype=np.int64)[detections.videos]
    kept = ~np.isin(found_in, [numbers[name] for name in left_out if name in numbers])
    own = np.array([place.get(name, -1) for name in detections.label_names], dtype=np.int64)
    if clean and aside.any():
        notes.append(f"{aside.sum()} {AMBIGUOUS!r} segments are left out: they are no class")
    _note_strangers(annotations, detections, subset, left_out, classes, notes)
    return Columns(
        classes,
        segments[~aside],
        videos[~aside],
        labels[~aside],
        detections.segments[kept],
        found_in[kept],
        own[detections.labels[kept]],
        detections.scores[kept],
        segments[aside],
        videos[aside],
    )


def _stack_segments(videos: Sequence[Video], numbers: Mapping[str, int], clean: bool) -> tuple[Floats, Ints, list[str]]:
    """Put the segments of some videos together: [N, 2] seconds, their videos' numbers [N], and N class names."""
    rows: list[tuple[float, float]] = []
    owners: list[int] = []
    names: list[str] = []
    for video in videos:
        chosen = np.arange(len(video.labels))
        if clean:
            proper = np.flatnonzero(video.segments[:, 1] > video.segments[:, 0])
            chosen = proper[unique_segments(video.segments[proper], [video.labels[index] for index in proper])]
        rows.extend((float(start), float(end)) for start, end in video.segments[chosen])
        owners.extend([numbers[video.name]] * len(chosen))
        names.extend(video.labels[index] for index in chosen)
    return np.array(rows, dtype=np.float64).reshape(-1, 2), np.array(owners, dtype=np.int64), names


def read_blocked(path: str | Path) -> tuple[str, ...]:
    """Read names of videos to leave out: a JSON list (OpenTAD's blocked.json) or one a line (missing_files.txt).

    Args:
        path: the file.

    Returns:
        The names, in the file's order.

    Raises:
        TensorkeepError: A JSON file holds anything else than a list of names.
    """
    path = Path(path)
    if path.suffix != ".json":
        return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TensorkeepError("not a list of video names", where=path)
    return tuple(names)


def guess_subset(annotations: Annotations, detections: DetectionTable) -> str:
    """Return the subset that most of the detections' videos belong to.

    Raises:
        TensorkeepError: No video of the detections is annotated, or two subsets have equally many.
    """
    named = set(detections.video_names)
    count = {subset: 0 for subset in annotations.subsets()}
    for video in annotations.videos.values():
        count[video.subset] += video.name in named
    best = [subset for subset, number in count.items() if number == max(count.values())]
    if len(best) != 1:
        what = "no video of the detections is annotated" if not max(count.values(), default=0) else "subset unclear"
        raise TensorkeepError(
            what,
            where=annotations.source,
            hint=f"name the subset, one of: {', '.join(annotations.subsets()) or 'none'}; videos there are called like "
            f"{next(iter(annotations.videos), '-')!r}, detections name {next(iter(named), '-')!r}",
        )
    return best[0]


def align_names(
    annotations: Annotations, detections: DetectionTable, notes: list[str]
) -> tuple[Annotations, DetectionTable]:
    """Drop ActivityNet's `v_` before video names where only one side has it; `notes` gets a sentence that says so.

    Nothing changes when at least one name is common, or when dropping the prefix would make two names one.
    """
    named = set(detections.video_names)
    if named & set(annotations.videos):
        return annotations, detections
    shorter = [replace(video, name=video.name.removeprefix("v_")) for video in annotations.videos.values()]
    bare = {video.name: video for video in shorter}
    if named & set(bare) and len(bare) == len(shorter):
        notes.append("video names were compared without the 'v_' that the annotations put before them")
        return replace(annotations, videos=bare), detections
    plain = tuple(name.removeprefix("v_") for name in detections.video_names)
    if set(plain) & set(annotations.videos) and len(set(plain)) == len(plain):
        notes.append("video names were compared without the 'v_' that the detections put before them")
        return annotations, replace(detections, video_names=plain)
    return annotations, detections


def _note_strangers(
    annotations: Annotations,
    detections: DetectionTable,
    subset: str,
    blocked: set[str],
    classes: tuple[str, ...],
    notes: list[str],
) -> None:
    """Add to `notes` which detections and videos have no counterpart: each costs precision, or counts for nothing."""
    inside = {name for name, video in annotations.videos.items() if video.subset == subset}
    strange = [name for name in detections.video_names if name not in inside and name not in blocked]
    if strange:
        notes.append(
            f"{len(strange)} videos with detections are not in subset {subset!r} (false positives): {strange[0]}"
        )
    unknown = sorted(set(detections.label_names) - set(classes) - {AMBIGUOUS})
    if unknown:
        notes.append(f"labels without an annotated segment, not scored: {', '.join(unknown[:5])}")
    silent = inside - set(detections.video_names) - blocked
    if silent:
        notes.append(f"{len(silent)} of {len(inside)} videos have no detection")
