"""Place windows over a long video: which frames each shows, and which annotated segments fall into it.

A *snippet* is one step of the feature grid: snippets start at frames 0, s, 2s, ... (s = `snippet_stride`). A window
covers `size` snippets; the next begins (1 - overlap) * size later; the one that would pass the end is moved back so
that it ends with the video. OpenTAD makes at most n // step windows, so with an overlap below one half the last
snippets of most videos are in no window, and it repeats the last window where one ends exactly with the video. Here
every snippet is in a window, and no window comes twice. Numpy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.errors import TensorkeepError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Window(NamedTuple):
    """One window over a video.

    Attributes:
        first: its first snippet.
        last: its last snippet that lies in the video.
        start_frame: the frame at which it begins.
        frames: [size * scale] numbers of the frames to decode.
        mask: [size], True for snippets that lie whole in the video, False for padding.
    """

    first: int
    last: int
    start_frame: int
    frames: Ints
    mask: NDArray[np.bool_]


def count_snippets(frames: int, snippet_stride: int) -> int:
    """Return the number of snippets of a video of `frames` frames; a last, shorter one counts.

    Example:
        >>> count_snippets(9, 4)
        3
    """
    if frames < 1 or snippet_stride < 1:
        raise TensorkeepError(f"frames {frames} and snippet stride {snippet_stride} must be at least 1")
    return -(-frames // snippet_stride)


def place_windows(snippets: int, size: int, overlap: float) -> list[tuple[int, int]]:
    """Place windows of `size` snippets over a video of `snippets` snippets.

    Args:
        snippets: length of the video.
        size: length of a window.
        overlap: part of a window that the next one repeats, in [0, 1).

    Returns:
        First and one-past-last snippet of each window.

    Raises:
        TensorkeepError: The numbers leave no window, or no step from one to the next.

    Example:
        >>> place_windows(100, 40, 0.5)
        [(0, 40), (20, 60), (40, 80), (60, 100)]
    """
    if snippets < 1 or size < 1 or not 0 <= overlap < 1:
        raise TensorkeepError(
            f"no windows of {size} snippets, overlap {overlap}, over {snippets}: overlap is in [0, 1)"
        )
    step = int(size * (1 - overlap))
    if step < 1:
        raise TensorkeepError(f"overlap {overlap} of windows of {size} snippets leaves no step between them")
    windows = []
    first = 0
    while first + size < snippets:
        windows.append((first, first + size))
        first += step
    return [*windows, (max(0, snippets - size), snippets)]


def make_window(bounds: tuple[int, int], frames: int, *, size: int, snippet_stride: int, scale: int = 1) -> Window:
    """Make the window that covers snippets `bounds`, padded to `size` by repeating its last frame.

    A video's last snippet may be cut: its frames past the end are the last sampled frame again. Where `scale` frames
    are decoded for each snippet and the video does not have all of them, the mask ends before it, as OpenTAD's does.

    Args:
        bounds: first and one-past-last snippet.
        frames: number of frames of the video.
        size: snippets of a window.
        snippet_stride: frames from one snippet to the next.
        scale: frames decoded for every snippet, snippet_stride / scale frames apart.

    Raises:
        TensorkeepError: `scale` does not divide `snippet_stride`.

    Example:
        >>> make_window((0, 3), 10, size=4, snippet_stride=4).frames
        array([0, 4, 8, 8])
    """
    first, stop = bounds
    if snippet_stride % scale:
        raise TensorkeepError(f"snippet stride {snippet_stride} is no multiple of {scale} frames a snippet")
    apart = snippet_stride // scale
    shown = np.arange(first * snippet_stride, stop * snippet_stride, apart)
    whole = max(int((shown < frames).sum()) // scale, 1)  # a video of less than one snippet is one all the same
    shown = np.minimum(shown, (frames - 1) // apart * apart)
    shown = np.concatenate([shown, np.full((size - (stop - first)) * scale, shown[-1])])
    return Window(first, stop - 1, first * snippet_stride, shown, np.arange(size) < whole)


def segment_frames(segments: Floats, *, duration: float, frames: int) -> Floats:
    """Turn segments [N, 2] in seconds into frame numbers [N, 2]: floor(seconds / duration * frames).

    This is how OpenTAD counts for THUMOS. `duration` is in seconds.

    Example:
        >>> segment_frames(np.array([[1.0, 2.5]]), duration=10, frames=25)
        array([[2., 6.]])
    """
    if duration <= 0 or frames < 1:
        raise TensorkeepError(f"duration {duration} and frames {frames} must be above 0")
    return np.trunc(segments / duration * frames)


def clip_to_window(
    segments: Floats, window: Window, *, snippet_stride: int, completeness: float = 0.75, offset: float = 0.0
) -> tuple[Floats, Ints]:
    """Keep the segments that lie in a window, cut to it.

    Args:
        segments: [N, 2] in frames of the video.
        window: the window; it reaches from the first frame of its first snippet to that of its last.
        snippet_stride: frames from one snippet (grid step) to the next.
        completeness: a segment stays if more than this part of it lies in the window.
        offset: frame that grid step 0 stands for.

    Returns:
        [M, 2] in grid steps of the window, and the indices [M] of these segments among the N.

    Example:
        >>> window = make_window((0, 8), 32, size=8, snippet_stride=4)
        >>> clip_to_window(np.array([[4.0, 8.0]]), window, snippet_stride=4)[0]
        array([[1., 2.]])
    """
    low, high = window.start_frame, window.last * snippet_stride
    cut = np.clip(segments, low, high)
    length = segments[:, 1] - segments[:, 0]
    inside = (cut[:, 1] - cut[:, 0]) / np.where(length > 0, length, 1)
    kept = np.flatnonzero(inside > completeness)
    return (cut[kept] - low - offset) / snippet_stride, kept


def resized_frames(frames: int, length: int, scale: int = 1) -> Ints:
    """Choose `length * scale` evenly spread frames that show a whole video of `frames` frames.

    Frame i is round((i + 0.5) * step - 0.5), half to even, with step = frames / (length * scale).

    Example:
        >>> resized_frames(8, 4)
        array([0, 2, 4, 6])
    """
    if frames < 1 or length < 1 or scale < 1:
        raise TensorkeepError(f"frames {frames}, length {length}, scale {scale} must be at least 1")
    step = frames / (length * scale)
    return np.clip(np.round((np.arange(length * scale) + 0.5) * step - 0.5), 0, frames - 1).astype(np.int64)


def resized_segments(segments: Floats, *, duration: float, length: int) -> NDArray[np.float32]:
    """Turn segments [N, 2] in seconds into grid steps [N, 2] of a video resized to `length` steps.

    Example:
        >>> resized_segments(np.array([[2.5, 20.0]]), duration=10, length=16)
        array([[ 4., 16.]], dtype=float32)
    """
    if duration <= 0 or length < 1:
        raise TensorkeepError(f"duration {duration} must be above 0 and length {length} at least 1")
    return (np.clip(segments / duration, 0, 1) * length).astype(np.float32)
