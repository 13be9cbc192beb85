"""What annotations say: which segments of which videos show which class. `annotations` reads it from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorkeep.errors import TensorkeepError, near_misses

AMBIGUOUS = "Ambiguous"  # THUMOS'14 marks segments with it that are neither right nor wrong: never a class


@dataclass(frozen=True)
class Video:
    """One annotated video.

    Attributes:
        name: name of the video, without a file's ending.
        subset: the part of the data set that it belongs to, such as "training".
        segments: [N, 2], start and end in seconds.
        labels: N class names.
        duration: seconds; None where the file does not say.
        frames: number of frames; None where the file does not say.
        fps: frames per second as stated; None where the file does not say.
    """

    name: str
    subset: str
    segments: NDArray[np.float64]
    labels: tuple[str, ...]
    duration: float | None = None
    frames: int | None = None
    fps: float | None = None

    def frame_rate(self) -> float | None:
        """Return frames per second: frames over duration where both are known, else the stated rate (or None)."""
        if self.frames and self.duration:
            return self.frames / self.duration
        return self.fps


@dataclass(frozen=True)
class Annotations:
    """All videos of one annotation file.

    Attributes:
        videos: name -> video, in file order.
        classes: class names in label order, `Ambiguous` left out.
        layout: "opentad", "mmaction", "actionformer", "ego4d", "epic", "table" or "thumos".
        source: path of the file or folder, for error messages.
    """

    videos: Mapping[str, Video]
    classes: tuple[str, ...]
    layout: str
    source: str

    def subsets(self) -> tuple[str, ...]:
        """Return the names of the subsets, sorted."""
        return tuple(sorted({video.subset for video in self.videos.values()}))

    def of_subset(self, subset: str) -> list[Video]:
        """Return the videos of one subset, in file order.

        Raises:
            TensorkeepError: The file has no such subset; names are compared whole, never as parts.
        """
        found = [video for video in self.videos.values() if video.subset == subset]
        if not found:
            known = ", ".join(self.subsets()) or "none"
            hint = near_misses(subset, self.subsets()) or f"subsets there: {known}"
            raise TensorkeepError(f"no video of subset {subset!r}", where=self.source, hint=hint)
        return found


def unique_segments(
    segments: NDArray[np.float64], labels: Iterable[object], tolerance: float = 1e-3
) -> NDArray[np.intp]:
    """Return the indices of segments that do not repeat an earlier one, in order.

    Args:
        segments: [N, 2] in seconds.
        labels: N class names or numbers.
        tolerance: seconds; a repetition has the same label and both ends this close (OpenTAD's evaluator uses 1e-3).

    Example:
        >>> unique_segments(np.array([[1.0, 2.0], [1.0004, 2.0], [1.0, 3.0]]), ["a", "a", "a"])
        array([0, 2])
    """
    kept: list[int] = []
    by_label: dict[object, list[tuple[float, float]]] = {}
    for index, ((start, end), label) in enumerate(zip(segments.tolist(), labels, strict=True)):
        earlier = by_label.setdefault(label, [])
        if not any(abs(start - first) <= tolerance and abs(end - last) <= tolerance for first, last in earlier):
            earlier.append((start, end))
            kept.append(index)
    return np.array(kept, dtype=np.intp)


def number_segments(video: Video, classes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a video's segments with class numbers; exact repetitions come once, `Ambiguous` segments are left out.

    Args:
        video: the annotated video.
        classes: class names in label order.

    Returns:
        Segments [N, 2] in seconds and their class numbers [N].

    Raises:
        TensorkeepError: A label is not among `classes`.

    Example:
        >>> number_segments(Video("v", "train", np.array([[1.0, 2.0]] * 2), ("dive", "dive")), ["dive"])[1]
        array([0])
    """
    kept = [index for index in unique_segments(video.segments, video.labels, 0.0) if video.labels[index] != AMBIGUOUS]
    for index in kept:
        if video.labels[index] not in classes:
            hint = near_misses(video.labels[index], classes) or "the class map belongs to another data set"
            if video.labels[index].isdecimal():
                hint = "labels are numbers here, the class map has names: write names, or leave the class map out"
            raise TensorkeepError(f"label {video.labels[index]!r} is not in the class map", where=video.name, hint=hint)
    numbers = np.array([classes.index(video.labels[index]) for index in kept], dtype=np.int64)
    return video.segments[kept], numbers
