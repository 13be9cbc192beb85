"""Ask for frames that the device that trains will decode, in place of decoding them where samples are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.containers import frame_table
from tensorkeep.detection.data.opening import file_state, opened, quarter_turn
from tensorkeep.detection.data.torchcodec_frames import Pictures, choose_pictures
from tensorkeep.errors import TensorkeepError

if TYPE_CHECKING:
    from tensorkeep.detection.data.augment import Draw

# without an index: torchcodec seeks in them by times at which packets are decoded, and comes out too late
_STREAMS = {"mpegts", "mpeg"}


class Asked(NamedTuple):
    """The frames of a sample before they are decoded.

    Attributes:
        pictures: which they are.
        indices: [T] their numbers, for another decoder.
        size: height and width that they are scaled to.
        broken: what another decoder does with damaged pictures.
        drawn: what is random about them; None: a square is cut out of their middle.
        side: pixels of that square.
    """

    pictures: Pictures
    indices: NDArray[np.int64]
    size: tuple[int, int]
    broken: Literal["error", "keep"] = "error"
    drawn: Draw | None = None
    side: int = 0


def ask(path: str, indices: NDArray[np.int64], fit: Callable[[int, int], tuple[int, int]]) -> Asked | str:
    """Ask for frames of a video.

    Args:
        path: a video file.
        indices: [T] numbers of frames, in any order.
        fit: gives of height and width those that frames are scaled to.

    Returns:
        What is asked for; or why the file is better decoded where damage is noticed and pictures are counted.

    Raises:
        TensorkeepError: The file cannot be read, or has no such frames.
    """
    table = frame_table(path)
    if not 0 <= indices.min() <= indices.max() < len(table.pts):
        what = f"frames {indices.min()} to {indices.max()} were asked for, it has {len(table.pts)}"
        raise TensorkeepError(what, where=path, hint="frame counts of the annotation and the file differ")
    if table.counted:
        return "its times are of no use for finding frames"
    if table.lost:
        return table.lost[0]
    state = file_state(path)
    first = _first_picture(path, state.st_size, state.st_mtime_ns)
    if first.kind in _STREAMS:
        return f"torchcodec does not find the pictures of a file of this kind ({first.kind})"
    pts, keys, places = choose_pictures(table.pts, table.key_pts, indices)
    pictures = Pictures(path, first.stream, table.time_base, first.shown, pts, keys, places)
    return Asked(pictures, indices, fit(*first.shown))


class _First(NamedTuple):
    """What a file's first picture tells: the container, the stream's number, height and width as shown."""

    kind: str
    stream: int
    shown: tuple[int, int]


@lru_cache(maxsize=64)
def _first_picture(path: str, length: int, changed: int) -> _First:
    """Look at a file's first picture; its length and time of change make a changed file another one to the cache."""
    del length, changed
    with opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise TensorkeepError("has no picture that can be decoded", where=path)
        size = (frame.height, frame.width)
        shown = size[::-1] if quarter_turn(frame.rotation) % 180 else size
        return _First(container.format.name, stream.index, shown)
