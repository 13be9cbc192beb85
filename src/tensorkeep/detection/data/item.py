"""One video of a data set, and where its annotated seconds lie among its frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.windows import resized_segments, segment_frames

_ROUNDING = 1e-6  # of a frame: a second that is the time of a frame lies on it, whatever its last bits


class Item(NamedTuple):
    """One video (or feature file) of a data set with its ground truth.

    Attributes:
        name: name of the video.
        path: its file.
        frames: number of frames.
        duration: seconds.
        size: bytes of the file.
        steps: time steps of a feature file, 0 for a video.
        segments: [N, 2] in seconds.
        labels: [N] class numbers.
        times: [frames + 1] seconds at which each frame is shown, and the end; None: they are evenly spread.
        counted: frames that `duration` stands for where they are not those of the file (OpenTAD's own grid); else 0.
        beside: feature files whose channels follow those of `path`.
    """

    name: str
    path: str
    frames: int
    duration: float
    size: int
    steps: int
    segments: NDArray[np.float64]
    labels: NDArray[np.int64]
    times: NDArray[np.float64] | None = None
    counted: int = 0
    beside: tuple[str, ...] = ()

    @property
    def fps(self) -> float:
        """Frames a second, as annotated seconds count them."""
        return (self.counted or self.frames) / self.duration


def frame_positions(item: Item) -> NDArray[np.float64]:
    """Return the segments [N, 2] of an item as whole frames: the frame that is shown at each of their ends.

    Where frames are evenly spread this is OpenTAD's count, floor(seconds / duration * frames).

    Example:
        >>> times = np.array([0.0, 0.1, 2.0, 2.1])
        >>> frame_positions(Item("v", "v.mp4", 3, 2.1, 0, 0, np.array([[0.1, 2.05]]), np.array([0]), times))
        array([[1., 2.]])
    """
    if item.times is None:
        return segment_frames(item.segments, duration=item.duration, frames=item.counted or item.frames)
    return np.floor(np.interp(item.segments, item.times, np.arange(len(item.times))) + _ROUNDING)


def frame_lengths(item: Item) -> NDArray[np.float64]:
    """Return how many frames each of the segments [N] of an item shows, parts of frames included.

    Example:
        >>> times = np.array([0.0, 0.1, 2.0, 2.1])
        >>> frame_lengths(Item("v", "v.mp4", 3, 2.1, 0, 0, np.array([[0.1, 2.05]]), np.array([0]), times))
        array([1.5])
    """
    if item.times is None:
        return (item.segments[:, 1] - item.segments[:, 0]) * item.fps
    positions = np.interp(item.segments, item.times, np.arange(len(item.times)))
    return positions[:, 1] - positions[:, 0]


def resized_positions(item: Item, length: int) -> NDArray[np.float64]:
    """Return the segments [N, 2] of an item in grid steps where the whole video is shown as `length` steps."""
    if item.times is None:
        return resized_segments(item.segments, duration=item.duration, length=length).astype(np.float64)
    return np.interp(item.segments, item.times, np.arange(len(item.times))) / item.frames * length


def seconds_shown(
    seconds: NDArray[np.float64], times: NDArray[np.float64] | None, duration: float
) -> NDArray[np.float64]:
    """Turn seconds at a video's mean rate into seconds at which the frames there are shown, linear between two frames.

    Args:
        seconds: of any shape.
        times: [frames + 1] as in `Item`; None: the seconds stay.
        duration: of the video, in seconds.

    Example:
        >>> seconds_shown(np.array([1.5]), np.array([0.0, 0.1, 0.2, 3.0]), 3.0)
        array([0.15])
    """
    if times is None:
        return seconds
    position = seconds * ((len(times) - 1) / duration)
    return np.interp(position, np.arange(len(times)), times)
