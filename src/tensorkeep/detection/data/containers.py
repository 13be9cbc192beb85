"""Look into a video file without decoding it: its length, frame rate, size, and when each of its frames is shown.

Frame i is the i-th picture in the order of presentation: what decoding the whole file and counting gives. Presentation
times come from the packets, so i means the same picture whatever the frame rate does, wherever decoding starts, and
whatever the header says. Pictures that an edit list hides, or that lack what they refer to where a file was cut, are
not shown and so are no frames. Where a container's times cannot be trusted (H.264 in AVI has none of its own, joined
transport streams start their clock again) frames are counted by decoding once. Needs PyAV
(`pip install tensorkeep[detection]`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.bare import swollen
from tensorkeep.detection.data.bounds import bounds, missing_fragments, whole_riff
from tensorkeep.detection.data.checksums import wrong_sums
from tensorkeep.detection.data.damage import Packet, clock_restarts, demuxed, find_odd, whole_packets
from tensorkeep.detection.data.gaps import missing_parts
from tensorkeep.detection.data.hearing import decoder
from tensorkeep.detection.data.ogg_pages import odd_pages
from tensorkeep.detection.data.opening import boxes, file_state, opened, quarter_turn
from tensorkeep.detection.data.stamps import last_step, rising, signed
from tensorkeep.errors import TensorkeepError

# their packets need not show a picture, or their pictures are changes to those before without a keyframe
_UNTRUSTED = {"vp8", "gif", "apng"}
_BARE = {"h264", "hevc", "vvc", "mpegvideo"}  # containers that are the pictures' own stream
_CODED = {"h264", "hevc"}  # of them those whose pictures end by themselves
_HEAD = 65536  # bytes that a header is looked for in
_EVEN = 0.5  # frames whose times are off the mean rate by less than this part of a frame are evenly spread


class VideoInfo(NamedTuple):
    """Size, rate and length of a video file.

    Attributes:
        path: the file.
        frames: how many can be read.
        fps: frames / duration.
        duration: seconds from the first picture to the end of the last.
        width: pixels, as shown after rotation.
        height: pixels, as shown after rotation.
        rotation: degrees counterclockwise.
        codec: FFmpeg's name of it.
        stated: the header's number of frames, 0 where it has none.
        problem: how the file is cut short or damaged, with place and length; None where it is whole.
        notes: what else is odd about when its pictures are shown.
        even: whether frames / duration puts every frame within half a frame of its time.
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
    notes: tuple[str, ...] = ()
    even: bool = True


class FrameTable(NamedTuple):
    """When each frame of a video is shown, and from which frames decoding may start.

    Attributes:
        pts: [N] presentation times, rising, in units of `time_base`.
        key_pts: [K] those of the keyframes, hidden ones too.
        time_base: seconds.
        counted: whether the file's times are of no use for finding frames, so that they are found by counting pictures.
        step: seconds for which the last frame is shown.
        lost: how the file is cut short or damaged, a sentence each.
        notes: what else is odd about its times.
        key_dts: [K] when each keyframe is decoded, of a transport stream, which FFmpeg searches by that; else empty.
    """

    pts: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    time_base: float
    counted: bool
    step: float
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    key_dts: tuple[int, ...] = ()

    @property
    def seconds(self) -> NDArray[np.float64]:
        """[N + 1] seconds after the first picture at which each frame is shown, the last of them the end."""
        shown = (self.pts - self.pts[0]) * self.time_base
        return np.append(shown, shown[-1] + self.step)

    def at(self, frame: int) -> float:
        """Return when a frame is shown, in seconds after the first picture."""
        return float(self.pts[frame] - self.pts[0]) * self.time_base

    def place(self, key: int) -> int:
        """Return the time by which a container finds a keyframe, by its number."""
        return int(self.key_dts[key] if self.key_dts else self.key_pts[key])


def probe(path: str | Path) -> VideoInfo:
    """Find out a video's size, rotation, rate and number of frames; one frame is decoded.

    The index in the header is believed where it is whole, hides nothing and gives every frame the same length, and the
    file ends with the picture that follows from it; else every packet is looked at.

    Args:
        path: a video file.

    Returns:
        What the file holds; `problem` tells whether it was cut short or is damaged.

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
        known = _even_index(container, stream, first.pts, file_state(path).st_size)
        if known and bounds(Path(path), container.format.name, (), boxes(path)).behind:
            known = None
    if rotation % 180:
        width, height = height, width
    if known is not None:
        frames, seconds = known
        return VideoInfo(str(path), frames, frames / seconds, seconds, width, height, rotation, codec, stated, None)
    table = frame_table(path)
    frames, seconds = len(table.pts), float(table.seconds[-1])
    even = shown_times(table) is None
    problem = "; ".join(table.lost) or None
    rate = frames / seconds
    return VideoInfo(
        str(path), frames, rate, seconds, width, height, rotation, codec, stated, problem, table.notes, even
    )


def shown_times(table: FrameTable, info: VideoInfo | None = None) -> NDArray[np.float64] | None:
    """Return when each frame is shown where the frame rate varies.

    Args:
        table: presentation times of the file.
        info: what the file holds; None: as the table has it.

    Returns:
        [frames + 1] seconds after the first picture, the last of them the end; None where frames / duration puts every
        frame within half a frame of its time.
    """
    shown = table.seconds
    frames, duration = (len(table.pts), float(shown[-1])) if info is None else (info.frames, info.duration)
    if frames != len(table.pts):
        return None
    mean = duration / frames
    even = np.abs(shown[:-1] - np.arange(frames) * mean).max() <= _EVEN * mean
    return None if even else shown


def frame_table(path: str | Path) -> FrameTable:
    """Find out when each frame is shown and where decoding may start, from the packets alone.

    A packet that is cut short is no frame. The tables of the last 64 files are kept in memory.

    Args:
        path: a video file.

    Returns:
        Times, keyframes, and what is wrong with the packets.

    Raises:
        TensorkeepError: The file cannot be read or has no frame.
    """
    state = file_state(path)
    return _frame_table(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _frame_table(path: str, length: int, changed: int) -> FrameTable:
    """Make the table of a file; its length and time of change make a changed file another one to the cache."""
    del length, changed
    failed: list[str] = []
    with opened(path) as (container, stream):
        codec, kind, unit = stream.codec_context.name, container.format.name, float(stream.time_base or 1)
        # bare pictures have no header: their average is FFmpeg's default, whatever rate the pictures state
        rate = float((stream.guessed_rate if kind in _BARE else stream.average_rate) or 25)
        every = [
            Packet(signed(kind, p.pts), signed(kind, p.dts), p.is_keyframe, p.is_corrupt, p.is_discard, p.size, p.pos)
            for p in demuxed(container, stream, failed=failed)
            if p.size or p.dts is not None
        ]
    rows, torn = whole_packets(every)
    shown = [row for row in rows if not row.discard]
    if not shown:
        raise TensorkeepError("has no whole frame", where=path, hint="the file may be cut short")
    restarts = clock_restarts(rows)
    plain, restarts = not restarts, [] if kind.startswith("mov") and _shown_in_turn(rows, restarts) else restarts
    # these have one time a packet, the decoder's: where pictures are reordered nothing says when they are shown
    guessed = (kind in ("avi", "asf") or _from_avi(path, kind)) and any(row.pts != row.dts for row in shown)
    guessed = guessed or (kind == "ogg" and any(row.pts is not None and row.pts < 0 for row in shown))
    plain = plain and codec not in _UNTRUSTED and not guessed
    shown = _presented(path, rows, shown) if plain else shown
    times = [row.pts for row in shown if row.pts is not None]
    if not plain or len(set(times)) != len(shown) or not shown:
        table = _counted_table(path, unit, rate, [row.dts for row in rows if row.dts is not None], bool(restarts))
    else:
        keys = sorted(
            (row.pts, row.pts if row.dts is None else row.dts) for row in rows if row.key and row.pts is not None
        )
        pts = np.sort(np.array(times, dtype=np.int64))
        key_pts = np.array([shown for shown, _ in keys] or [min(times)], dtype=np.int64)
        key_dts = tuple(decoded for _, decoded in keys) if kind == "mpegts" else ()
        table = FrameTable(pts, key_pts, unit, False, last_step(pts, unit, rate), key_dts=key_dts)
    file, again = Path(path), partial(opened, path)
    if kind == "mpegts":
        table = table._replace(lost=(*table.lost, *_untimed(table, rows)))
    whole = partial(whole_riff, file) if kind == "avi" else bool
    lacking = partial(missing_fragments, file) if kind.startswith("mov") else partial(missing_parts, file, kind)
    lost, notes = find_odd(file, again, table.seconds, rows, torn=torn, restarts=restarts, whole=whole, gone=lacking)
    lost = (*table.lost, *lost)
    return table._replace(lost=(*lost, *_beyond(path, kind, table, rows, failed, lost)), notes=notes)


def _beyond(
    path: str, kind: str, table: FrameTable, rows: list[Packet], failed: list[str], lost: tuple[str, ...]
) -> Iterator[str]:
    """Say what else is wrong with a file, of which `lost` is known, by its format's own lengths and marks."""
    frames = len(table.pts)
    place = f"behind frame {frames - 1} ({table.seconds[-1]:.2f} s)"
    ends = [-1 if r.pos is None else r.pos + r.size for r in rows]
    lacks, behind, within = bounds(Path(path), kind, ends, boxes(path))
    if kind == "ogg":
        lacks, within = odd_pages(Path(path), ends)
    if failed:
        yield f"it cannot be read further {place}: {failed[0]}"
    if lacks and not any("cut short" in each for each in lost):
        yield f"cut short: {frames} whole frames in {table.seconds[-1]:.2f} s, {lacks}"
    if behind and not lost:
        yield f"the last {behind} bytes, {place}, are another recording that players do not show"
    within = within or (None if lost else wrong_sums(Path(path), kind, ends))
    if within:
        yield within
    for number in (
        swollen(partial(opened, path), [r.size for r in rows], [r.key for r in rows]) if kind in _CODED else ()
    ):
        yield f"bytes that are no picture lie near frame {number} ({table.seconds[min(number, frames)]:.2f} s)"


def _untimed(table: FrameTable, rows: list[Packet]) -> Iterator[str]:
    """Say where a transport stream has lost the times of single pictures: the head of their packets."""
    lacking = [k for k, row in enumerate(rows) if row.pts is None]
    if 0 < len(lacking) <= len(rows) // 10 and any(row.corrupt for row in rows):
        first = min(lacking[0], len(table.pts) - 1)
        yield f"the times of {len(lacking)} pictures are lost, the first near frame {first} ({table.at(first):.2f} s)"


def _from_avi(path: str, kind: str) -> bool:
    """Return whether a Matroska file holds a stream as AVI has it, with times of decoding alone."""
    with Path(path).open("rb") as file:
        return kind.startswith("matroska") and b"V_MS/VFW/FOURCC" in file.read(_HEAD)


def _shown_in_turn(rows: list[Packet], restarts: list[int]) -> bool:
    """Return whether parts between which decoding goes back are shown one after the other, as an edit list has it."""
    edges = [0, *restarts, len(rows)]
    parts = [[r.pts for r in rows[a:b] if r.pts is not None and not r.discard] for a, b in pairwise(edges)]
    return all(max(a) <= min(b) for a, b in pairwise(part for part in parts if part))


def _presented(path: str, rows: list[Packet], shown: list[Packet]) -> list[Packet]:
    """Leave out the pictures at the start of a cut file that lack what they refer to, as decoding it shows.

    Those are suspected that come before the first keyframe, in the file or on the screen.
    """
    number = next((k for k, row in enumerate(rows) if row.key), len(rows))
    key = rows[number].pts if number < len(rows) else None
    early = {row.pts for row in rows[:number]}
    early |= {row.pts for row in rows[number:] if key is not None and row.pts is not None and row.pts < key}
    early &= {row.pts for row in shown}
    if not early:
        return shown
    found = set()
    with opened(path) as (container, stream):
        hear = decoder(stream)
        for packet in demuxed(container, stream):
            frames = hear(packet).frames
            found |= {frame.pts for frame in frames}
            if key is not None and any(frame.pts is not None and frame.pts >= key for frame in frames):
                break
    return [row for row in shown if row.pts not in early or row.pts in found]


def _counted_table(path: str, unit: float, rate: float, dts: list[int], restarted: bool) -> FrameTable:
    """Make the table of a file without usable times by decoding it; damaged frames at its end are left out.

    Times are those of the decoded pictures; where they do not rise, those at which they were decoded, or evenly spread
    ones. Where a clock started again each part goes on where the one before ended.
    """
    times: list[int | None] = []
    number, started = 0, False
    bad: list[int] = []  # frames near which pictures are damaged; before the first one they lack what they refer to
    with opened(path) as (container, stream):
        hear = decoder(stream, from_start=True)
        for packet in demuxed(container, stream):
            frames, failed, complained = hear(packet)
            bad += [len(times)] * (started and bool(failed or complained))
            for frame in frames:
                started = started or bool(frame.key_frame)
                bad += [len(times)] * (started and bool(frame.is_corrupt))
                times.append(signed(container.format.name, frame.pts))
                number = number if frame.is_corrupt else len(times)
    if not number:
        raise TensorkeepError("has no whole frame", where=path, hint="the file may be cut short")
    nothing = np.zeros(0, dtype=np.int64)
    pts, unit = rising(times[:number], unit, rate, dts, restarted)
    table = FrameTable(pts, nothing, unit, True, last_step(pts, unit, rate))
    lost = [_near(table, [k for k in bad if k < number])] if any(k < number for k in bad) else []
    if bad and bad[-1] >= number:
        lost.append(f"cut short: {number} whole frames in {table.seconds[-1]:.2f} s, and the beginning of one more")
    return table._replace(lost=tuple(lost))


def _near(table: FrameTable, bad: list[int]) -> str:
    """Say near which frames pictures are damaged: a decoder gives a picture some packets after its own."""
    known = sorted(set(bad))
    last = f", the last near frame {known[-1]} ({table.at(known[-1]):.2f} s)" if len(known) > 1 else ""
    what = "a picture is" if len(known) == 1 else f"about {len(known)} pictures are"
    return f"{what} damaged or cannot be decoded, the first near frame {known[0]} ({table.at(known[0]):.2f} s){last}"


def _even_index(container: Any, stream: Any, first: int | None, length: int) -> tuple[int, float] | None:
    """Return frames and seconds of a file whose index gives every frame the same length; None where it may not be so.

    MP4 and MOV alone have such an index: where it is whole nothing of the file can be missing. Its times are those of
    decoding, which are even where the pictures' are, but for the last few: so the last pictures are looked at.
    """
    entries = stream.index_entries
    if not container.format.name.startswith("mov") or first is None or stream.frames < 2:
        return None
    if len(entries) != stream.frames:
        return None
    rows = [(entry.timestamp, entry.pos + entry.size, entry.is_discard) for entry in entries]
    times = np.array([row[0] for row in rows], dtype=np.int64)
    mean = float(times[-1] - times[0]) / (len(times) - 1)
    uneven = np.abs(times - times[0] - np.arange(len(times)) * mean).max() > _EVEN * mean
    if mean <= 0 or uneven or any(end > length or hidden for _, end, hidden in rows):
        return None
    container.seek(int(times[-1]), stream=stream, backward=True)
    last = [packet.pts for packet in demuxed(container, stream) if packet.size and packet.pts is not None]
    if not last or abs(max(last) - first - (len(times) - 1) * mean) > _EVEN * mean:
        return None
    return len(times), float((max(last) - first) * stream.time_base * len(times) / (len(times) - 1))
