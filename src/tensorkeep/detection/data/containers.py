"""Look into a video file without decoding it: its length, frame rate, size, and when each of its frames is shown.

Frame i is the i-th picture in the order of presentation: what decoding the whole file and counting gives. Presentation
times come from the packets, so i means the same picture whatever the frame rate does, wherever decoding starts, and
whether or not the header has a count. Where a container's times cannot be trusted (H.264 in AVI has none of its own)
frames are counted by decoding once. Needs PyAV (`pip install tensorkeep[detection]`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ts")
MEND = "play it, or write it anew: ffmpeg -i FILE -c:v libx264 NEW.mp4"
_UNTRUSTED = {"vp8"}  # its packets need not show a picture
_ATTACHED = 1024  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC: a cover, no video
# a playlist in place of a video would have FFmpeg open whatever it names
_ALLOWED = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg",
}
_LATE = 0.02  # a file whose pictures end this part of its stated length too early was cut short


class VideoInfo(NamedTuple):
    """Size, rate and length of a video file.

    Attributes:
        path: the file.
        frames: how many can be read.
        fps: frames / duration.
        duration: seconds.
        width: pixels, as shown after rotation.
        height: pixels, as shown after rotation.
        rotation: degrees counterclockwise.
        codec: FFmpeg's name of it.
        stated: the header's number of frames, 0 where it has none.
        problem: how the file is incomplete; None where it is whole.
    """

    path: str
    frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    stated: int
    problem: str | None


class FrameTable(NamedTuple):
    """When each frame of a video is shown, and from which frames decoding may start.

    Attributes:
        pts: [N] presentation times, rising, in units of `time_base`.
        key_pts: [K] those of the keyframes.
        time_base: seconds.
        counted: whether the times are of no use, so that frames are found by counting pictures.
    """

    pts: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    time_base: float
    counted: bool


def probe(path: str | Path) -> VideoInfo:
    """Find out a video's size, rotation, rate and number of frames; one frame is decoded.

    The header's number of frames is taken where the file's index has as many entries; else packets are counted.

    Args:
        path: a video file.

    Returns:
        What the file holds; `problem` tells whether it was cut short.

    Raises:
        TensorkeepError: The file is missing, is no video or gives no picture, or PyAV is not installed.

    Example:
        >>> probe("v_001.mp4").frames  # doctest: +SKIP
        5172
    """
    with opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise TensorkeepError("has no picture that can be decoded", where=path)
        rotation, width, height = quarter_turn(first.rotation), first.width, first.height
        stated, codec = stream.frames, stream.codec_context.name
        rate = float(stream.average_rate or 25)
        seconds = _stated_seconds(container, stream)
        frames = _indexed_frames(stream, _state(path).st_size)
    problem = None
    if not frames or not seconds:
        table = frame_table(path)
        frames = len(table.pts)
        shown = frames / rate
        if not table.counted and frames > 1:
            shown = float(table.pts[-1] - table.pts[0]) * table.time_base * frames / (frames - 1)
        if stated > frames or shown < seconds * (1 - _LATE):
            problem = f"cut short: {frames} whole frames in {shown:.2f} s, its header says {seconds:.2f} s"
        seconds = shown if problem or not seconds else seconds
    if rotation % 180:
        width, height = height, width
    return VideoInfo(str(path), frames, frames / seconds, seconds, width, height, rotation, codec, stated, problem)


def frame_table(path: str | Path) -> FrameTable:
    """Find out when each frame is shown and where decoding may start, from the packets alone.

    A packet that is cut short is no frame. The tables of the last 64 files are kept in memory.

    Raises:
        TensorkeepError: The file cannot be read or has no frame.
    """
    state = _state(path)
    return _frame_table(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _frame_table(path: str, length: int, changed: int) -> FrameTable:
    """Make the table of a file; its length and time of change make a changed file another one to the cache."""
    del length, changed
    with opened(path) as (container, stream):
        codec, kind, unit = stream.codec_context.name, container.format.name, float(stream.time_base or 1)
        rows = [
            (packet.pts, packet.dts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_corrupt and not packet.is_discard
        ]
    times = [pts for pts, _, _ in rows if pts is not None]
    # AVI has one time a packet, the decoder's: where pictures are reordered nothing says when they are shown
    guessed = kind == "avi" and any(pts != dts for pts, dts, _ in rows)
    if codec in _UNTRUSTED or guessed or len(set(times)) != len(rows):
        return _counted_table(path, unit)
    if not rows:
        raise TensorkeepError("has no whole frame", where=path, hint="the file may be cut short")
    keys = np.array(sorted(pts for pts, _, key in rows if key) or [min(times)], dtype=np.int64)
    return FrameTable(np.sort(np.array(times, dtype=np.int64)), keys, unit, False)


def _counted_table(path: str, unit: float) -> FrameTable:
    """Make the table of a file without usable times by decoding it; damaged frames at its end are left out."""
    number = count = 0
    with opened(path) as (container, stream):
        for packet in container.demux(stream):
            with contextlib.suppress(import_av().error.InvalidDataError):  # whoever asks for such a frame is told
                for frame in packet.decode():
                    count += 1
                    number = number if frame.is_corrupt else count
    if not number:
        raise TensorkeepError("has no whole frame", where=path, hint="the file may be cut short")
    nothing = np.zeros(0, dtype=np.int64)
    return FrameTable(np.arange(number), nothing, unit, True)


def _stated_seconds(container: Any, stream: Any) -> float:
    """Return the length in seconds that the header gives, 0 where it gives none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else 0.0


def _indexed_frames(stream: Any, length: int) -> int:
    """Return the header's number of frames where the index has each of them within `length` bytes; else 0."""
    entries = stream.index_entries
    if not stream.frames or len(entries) != stream.frames:
        return 0
    inside = all(entry.pos + entry.size <= length and not entry.is_discard for entry in entries)
    return int(stream.frames) if inside else 0


@contextlib.contextmanager
def opened(path: str | Path, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Open a video file; gives PyAV's container and its first stream of moving pictures.

    Raises:
        TensorkeepError: The file is no video or has no video stream, in place of FFmpeg's own errors.
    """
    av = import_av()
    _state(path)
    with explained(path):
        try:
            with av.open(f"file:{Path(path).absolute()}", options=_ALLOWED) as container:
                streams = [s for s in container.streams.video if not s.disposition & _ATTACHED]
                if not streams:
                    raise TensorkeepError("has no video stream", where=path)
                stream = streams[0]
                stream.codec_context.thread_type = "AUTO" if threads != 1 else "NONE"
                stream.codec_context.thread_count = threads
                yield container, stream
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise TensorkeepError(f"cannot be read as a video: {error.strerror}", where=path, hint=MEND) from None


def quarter_turn(degrees: int) -> int:
    """Return the nearest multiple of 90 degrees in [0, 360): pictures are never turned by less."""
    return round(degrees / 90) * 90 % 360


def _state(path: str | Path) -> os.stat_result:
    """Return size and time of change of a file; a missing file is a TensorkeepError."""
    with explained(path):
        return Path(path).stat()


def import_av() -> Any:
    """Import PyAV; raises TensorkeepError that says how to install it where it is missing."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        hint = "pip install 'tensorkeep[detection]'"
        raise TensorkeepError(f"reading videos needs PyAV: {error}", where="video", hint=hint) from error
