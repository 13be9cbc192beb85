"""What is wrong with a video file's packets: cut short, clocks that start again, and holes, with place and length.

A file is cut short where its header gives a length that none of its streams reaches, where its index points past its
end, or where its last packet is not whole. Footage is lost where no picture is shown for more than a few frame times
and bytes lie there that belong to no packet. A long pause between pictures alone is no damage (screens are recorded
so); it is told where all other pictures come at an even rate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Opened = Callable[[], AbstractContextManager[tuple[Any, Any]]]  # gives PyAV's container and the video stream
_LATE = 0.02  # a file whose streams end this part of its stated length too early was cut short
_LEAST = 0.1  # seconds of that at least
_FEW = 3.5  # a step of more than so many frame times is looked into
_ONE = 1.6  # so is one in which a single picture is lacking, where such steps are rare
_PAUSE = (10, 0.5)  # frame times and seconds of a pause that is told
_STRAY = 1000  # bytes between two packets of a transport stream that are nothing unusual
_LITTLE = 200  # elsewhere
_CHAINED = ("mov", "avi", "asf", "mpeg")  # whose packets are found by an index or one by the other, not by searching
_STATES_LENGTH = ("matroska", "flv", "asf", "avi", "mov")  # whose headers give a length; others' is a guess
_EXACT = ("ivf", "mxf")  # to a picture
_UNKNOWN = 0xFFFFFFFF  # pictures that a header counts of a recording in a pipe
_TS_PACKETS = (188, 192, 204)
_SYNC = 0x47  # the first byte of each
_HEAD, _TAIL = 4096, 65536  # bytes that are looked at
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # its object that has the file's length
_OPEN = (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75")  # Matroska's segments and clusters, which are looked into
_BEHIND = 0.02  # part of a file at its end that may be no packet


class Packet(NamedTuple):
    """What is known of a packet of the video stream without decoding it.

    Attributes:
        pts: presentation time in the stream's units, where it has one.
        dts: decoding time, likewise.
        key: whether decoding may start here.
        corrupt: whether the container calls it damaged or cut off.
        discard: whether an edit list hides its picture.
        size: bytes.
        pos: where it lies in the file, where that is known.
    """

    pts: int | None
    dts: int | None
    key: bool
    corrupt: bool
    discard: bool
    size: int
    pos: int | None


def demuxed(container: Any, *streams: Any, failed: list[str] | None = None) -> Iterator[Any]:
    """Give the packets of streams as PyAV does, and the empty ones at the end that have a decoder give what it holds.

    Where the container cannot be read further its packets end, as those of a player do.

    Args:
        container: PyAV's.
        streams: of the container.
        failed: gets FFmpeg's word for why it cannot be read further.
    """
    ended = False
    broken: Any = importlib.import_module("av.error").FFmpegError
    for _ in range(3):
        try:
            for packet in container.demux(*streams):
                ended = not packet.size and packet.dts is None
                yield packet
        except IndexError:  # noise can look like another stream, which PyAV stumbles over when the file ends
            if not ended:
                continue
        except broken as error:
            if failed is not None:
                failed.append(str(error.strerror))
        return


def whole_packets(packets: Sequence[Packet]) -> tuple[list[Packet], bool]:
    """Return the packets that hold something, without one that is cut off at the end; and whether there was one."""
    rows = [packet for packet in packets if packet.size]
    torn = bool(rows) and rows[-1].corrupt
    while rows and rows[-1].corrupt:
        rows.pop()
    return rows, torn


def clock_restarts(rows: Sequence[Packet]) -> list[int]:
    """Return the packets, by number, at which decoding times fall back: another recording was appended there."""
    known = [(number, row.dts) for number, row in enumerate(rows) if row.dts is not None]
    if len(known) < 3:
        return []
    times = np.array([dts for _, dts in known], dtype=np.int64)
    steps = np.diff(times)
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0
    return [known[k + 1][0] for k in np.flatnonzero(steps < -2 * usual).tolist()] if usual else []


def find_odd(
    path: Path,
    opened: Opened,
    seconds: NDArray[np.float64],
    rows: Sequence[Packet],
    *,
    torn: bool,
    restarts: Sequence[int],
    whole: Callable[[], bool] = bool,
    gone: Callable[[], str] = str,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find out what is wrong with a file, and what is merely odd about when its pictures are shown.

    Args:
        path: the file.
        opened: opens it.
        seconds: [frames + 1] at which its frames are shown, and the end.
        rows: the video stream's packets in the order of the file.
        torn: whether the last packet was cut off.
        restarts: packets at which the clock starts again.
        whole: whether the file's own lengths show that nothing lacks in it.
        gone: says what lacks within the file by its format's own counting; "" where nothing does or it has none.

    Returns:
        Sentences on what is lost or mixed up, and on what is odd.
    """
    lost: list[str] = []
    frames = len(seconds) - 1
    with opened() as (container, stream):
        lost += _missing_of_index(container, stream, rows, seconds)
        short = None if lost else _cut_short(path, opened, container, stream, seconds, rows, torn, whole)
        kind, number = container.format.name, int(stream.id)
        short_of = kind == "mxf" and len(rows) < (stream.duration or 0)  # of pictures that its header counts
    lost += [short] if short else []
    overwritten = _overwritten(path) if kind == "mpegts" and not lost else ""
    lost += [overwritten] if overwritten else []
    behind = 0 if lost or restarts else _bytes_behind(path, opened, kind, rows)
    if behind:
        lost.append(f"the last {behind} bytes, behind frame {frames - 1} ({seconds[-1]:.2f} s), cannot be read")
    if restarts:
        first = min(restarts[0], len(seconds) - 2)
        what = f"its clock starts again {len(restarts)} times, first" if len(restarts) > 1 else "its clock starts again"
        lost.append(f"{what} at frame {first} ({seconds[first]:.2f} s): recordings were joined there")
    if kind == "mpegts":
        gone = partial(_uncounted, path, number)
    elif short_of:
        gone = partial(str, "its header counts more pictures")
    damaged, pauses = _holes(opened, kind, seconds, gone)
    return (*lost, *damaged), pauses


def _cut_short(
    path: Path,
    opened: Opened,
    container: Any,
    stream: Any,
    seconds: NDArray[np.float64],
    rows: Sequence[Packet],
    torn: bool,
    whole: Callable[[], bool],
) -> str | None:
    """Say how a file ends too early; None where it does not."""
    frames, end, length = len(seconds) - 1, float(seconds[-1]), path.stat().st_size
    kind = container.format.name.partition(",")[0]
    what = f"cut short: {frames} whole frames in {end:.2f} s"
    said = float(stream.duration * stream.time_base) if kind in ("avi", *_EXACT) and stream.duration else 0.0
    if kind == "asf":  # FFmpeg adds when a stream begins to what the header says of the whole
        said = max(float((each.duration or 0) * each.time_base) for each in _streams(container))
    early = min(0, container.start_time or 0)  # FFmpeg adds what comes before 0 to fragments' lengths
    said = said or ((container.duration or 0) + early) / 1e6
    if kind == "mov" and any(entry.pos + entry.size > length for entry in stream.index_entries):
        return f"{what}, its header says {stream.frames} frames in {said:.2f} s"
    if kind in _EXACT and len(rows) < (said - 0.5 * end / frames) * frames / end and stream.duration < _UNKNOWN:
        return f"{what}, its header says {said:.2f} s"
    states = kind in _STATES_LENGTH and not (kind == "avi" and _unfinished(path))
    states = states and not (kind == "mov" and stream.frames)  # an edited MP4's index says all
    late = said - max(_LATE * said, _LEAST)
    # the header of an AVI that is whole counts pictures, too, that were dropped at its end
    if states and end < late and _last_end(opened) < late and not whole():
        return f"{what}, its header says {said:.2f} s"
    if torn:
        return f"{what}, and the beginning of one more"
    if _lacks_end(path, kind, length) or (kind == "matroska" and not said and _open_element(path, length)):
        return f"{what}, then the file ends where its format has more"
    if kind == "mpegts" and not _whole_ts_packets(path, length):
        return f"{what}, it ends within a packet"
    return None


def _unfinished(path: Path) -> bool:
    """Return whether an AVI's header was never completed, as in a pipe: the lengths in it are none."""
    with path.open("rb") as file:
        return file.read(8)[4:] in (bytes(4), b"\xff" * 4)


def _ts_grid(path: Path) -> tuple[int, int] | None:
    """Return the length of a transport stream's packets, and where the first one begins; None where none is seen."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for size in _TS_PACKETS:  # 192: four bytes before each
        for first in range(size):
            if head[first : first + 4 * size : size] == b"GGGG":
                return size, first
    return None


def _whole_ts_packets(path: Path, length: int) -> bool:
    """Return whether a transport stream ends with a whole packet, wherever its first one lies."""
    size, first = _ts_grid(path) or (0, 0)
    if not size:
        return any(length % each == 0 for each in _TS_PACKETS)
    rest = (length - first) % size
    if rest in (0, size - 4):
        return True
    with path.open("rb") as file:
        file.seek(length - rest)
        return file.read(1)[0] != _SYNC  # what begins otherwise was put behind it


def _open_element(path: Path, length: int) -> bool:
    """Return whether the last element of a Matroska file without a stated length, a live recording, is not whole."""
    place = 0
    with path.open("rb") as file:
        while place < length:
            file.seek(place)
            head = file.read(12)
            name, width = _width(head), _width(head[_width(head) :])
            if not name or not width or len(head) < name + width:
                return place + 12 > length and any(head)  # zeros are padding, anything else no Matroska
            size = int.from_bytes(head[name : name + width], "big") - (1 << 7 * width)
            place += name + width
            if head[:name] not in _OPEN and size < (1 << 7 * width) - 1:
                place += size
    return place > length


def _width(head: bytes) -> int:
    """Return how many bytes a number of Matroska's takes that begins with these; 0 where none does."""
    return 9 - head[0].bit_length() if head and head[0] else 0


def _lacks_end(path: Path, kind: str, length: int) -> bool:
    """Return whether a file lacks the mark of its format's end, or bytes that its header or its last page counts."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(max(0, length - _TAIL))
        tail = file.read()
    if kind == "ogg":  # a page's head gives the lengths of its parts
        page = tail.rfind(b"OggS")
        parts = tail[page + 27 : page + 27 + tail[page + 26]] if len(tail) > page + 26 else b""
        return page >= 0 and page + 27 + len(parts) + sum(parts) > len(tail)
    if kind == "mpeg":  # so does a packet's
        packet = max(tail.rfind(mark) for mark in (b"\0\0\1\xe0", b"\0\0\1\xc0", b"\0\0\1\xbd"))
        return packet >= 0 and packet + 6 + int.from_bytes(tail[packet + 4 : packet + 6], "big") > len(tail)
    if kind == "asf":
        place = head.find(_ASF_PROPERTIES)
        return place >= 0 and int.from_bytes(head[place + 40 : place + 48], "little") > length
    return False


def _bytes_behind(path: Path, opened: Opened, kind: str, rows: Sequence[Packet]) -> int:
    """Return how many bytes at the end of a file belong to no packet, where its format has nothing to put there."""
    if kind != "flv":
        return 0
    length = path.stat().st_size
    most = max(_BEHIND * length, _LITTLE)
    if length - max(((row.pos or 0) + row.size for row in rows), default=0) <= most:
        return 0
    last = 0
    with opened() as (container, _):
        for packet in demuxed(container, *_streams(container)):
            if packet.size:
                last = max(last + packet.size if packet.pos is None else packet.pos + packet.size, last)
    return max(0, length - last) if length - last > most else 0


def _missing_of_index(container: Any, stream: Any, rows: Sequence[Packet], seconds: NDArray[np.float64]) -> list[str]:
    """Say which pictures of an AVI's index were not found where it has them, while later ones were."""
    entries = stream.index_entries
    if container.format.name != "avi" or not rows:
        return []
    there = {row.pos - head for row in rows if row.pos is not None for head in (0, 8)}  # with or without a chunk's head
    missing = [k for k, entry in enumerate(entries) if entry.size and entry.pos not in there]
    if not missing or missing[-1] == len(entries) - 1:
        return []
    first = missing[0]
    at = float(seconds[min(first, len(seconds) - 1)])
    return [f"{len(missing)} of {len(entries)} pictures are lost, the first at frame {first} ({at:.2f} s)"]


def _last_end(opened: Opened) -> float:
    """Return when the last packet of any stream ends, in seconds from 0, or from the first one where it is before 0."""
    first = last = 0.0
    with opened() as (container, _):
        for packet in demuxed(container, *_streams(container)):
            if packet.size and packet.pts is not None and not packet.is_corrupt:
                first = min(first, float(packet.pts * packet.time_base))
                last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return last - first


def _streams(container: Any) -> list[Any]:
    return [stream for stream in container.streams if stream.type in ("video", "audio", "subtitle")]


def _holes(
    opened: Opened, kind: str, seconds: NDArray[np.float64], missing: Callable[[], str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Say where no picture is shown for long: because bytes there are lost, or as a pause in an even recording.

    `missing` says what lacks by the format's own counting.
    """
    steps = np.diff(seconds[:-1])
    if len(steps) < 3:
        return (), ()
    usual = float(np.median(steps))
    long, single = np.flatnonzero(steps > _FEW * usual), np.flatnonzero(steps > _ONE * usual)
    long = long[long > 0] if kind == "avi" else long  # there a late start is a first picture that stands
    if not len(single):
        return (), ()
    rare = max(3, len(steps) // 100)
    gone = missing()
    suspected = single if len(single) <= rare and (gone or kind != "mpegts") else long
    if len(suspected):
        unread = 0 if kind.split(",")[0] in _CHAINED else _unread_bytes(opened, kind)
        gone = f"{unread} bytes of the file cannot be read" if unread else gone
        if gone:
            return (f"footage is lost: {_told(suspected, steps, seconds, usual)}; {gone}",), ()
    if not len(long):
        return (), ()
    rest = np.delete(steps, long)
    even = len(long) <= rare and bool((np.abs(rest - usual) <= 0.6 * usual).all())
    pauses = long[(steps[long] > _PAUSE[0] * usual) & (steps[long] > _PAUSE[1])]
    return (), ((_told(pauses, steps, seconds, usual),) if even and len(pauses) else ())


def _overwritten(path: Path) -> str:
    """Say how many packets of a transport stream do not begin as they have to, where the others do."""
    size, first = _ts_grid(path) or (0, 0)
    if not size:
        return ""
    marks = np.array(np.memmap(path, np.uint8, "r", first)[::size])
    good = np.flatnonzero(marks == _SYNC)
    marks = marks[: good[-1] + 1]  # what lies behind the last one is looked at elsewhere
    bad = len(marks) - len(good)
    return f"{bad} of its {len(marks)} packets are overwritten" if 0 < bad < len(marks) / 2 else ""


def _uncounted(path: Path, number: int) -> str:
    """Say whether packets of a transport stream's part are missing by the count that each has, modulo 16."""
    size, first = _ts_grid(path) or (0, 0)
    if not size:
        return ""
    data = np.memmap(path, np.uint8, "r", first)
    rows = data[: len(data) // size * size].reshape(-1, size)[:, :6]
    rows = np.array(rows[((rows[:, 1] & 31).astype(np.int32) << 8 | rows[:, 2]) == number])
    rows = rows[rows[:, 3] & 16 > 0]  # those without a payload are not counted
    steps = np.diff(rows[:, 3] & 15) & 15
    said = (rows[1:, 3] & 32 > 0) & (rows[1:, 4] > 0) & (rows[1:, 5] & 128 > 0)  # a jump that is meant
    return "packets of the stream are missing" if ((steps > 1) & ~said).any() else ""


def _told(places: NDArray[np.intp], steps: NDArray[np.float64], seconds: NDArray[np.float64], usual: float) -> str:
    """Say where pictures are lacking, and for how long."""
    parts = [f"{steps[k]:.2f} s after frame {k} ({seconds[k]:.2f} s)" for k in places[:3].tolist()]
    more = f" and {len(places) - 3} more times" if len(places) > 3 else ""
    return f"no picture is shown for {', '.join(parts)}{more}, elsewhere one every {usual:.3f} s"


def _unread_bytes(opened: Opened, kind: str) -> int:
    """Return how many bytes between packets belong to none, beyond what the container itself needs there."""
    sizes: dict[int, int] = {}
    place: dict[int, int] = {}
    with opened() as (container, _):
        for packet in demuxed(container, *_streams(container)):
            if packet.size:
                at = packet.pos if packet.pos is not None and packet.pos >= 0 else place.get(packet.stream_index)
                if at is not None:  # a packet without a place lies behind the one before
                    place[packet.stream_index] = at
                    sizes[at] = sizes.get(at, 0) + packet.size
    starts = np.array(sorted(sizes), dtype=np.int64)
    if len(starts) < 3:
        return 0
    lengths = np.array([sizes[int(at)] for at in starts], dtype=np.int64)
    gaps = starts[1:] - np.maximum.accumulate(starts + lengths)[:-1]
    usual = float(np.median(np.maximum(gaps, 0)))
    holes = gaps[gaps > (_STRAY if kind == "mpegts" else _LITTLE) + 8 * usual + 0.1 * lengths[:-1]]
    return int(holes.sum())
