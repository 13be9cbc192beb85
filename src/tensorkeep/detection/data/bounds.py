"""Where a video file ends by its own format: whether bytes are lacking there, and what lies behind.

Many formats say how long a file is: boxes and elements have lengths, headers count bytes or pictures. A file
that is shorter was cut, or lost bytes on the way. Where a second file was joined to the first, players of most formats
stop at its beginning and say nothing.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

# the first bytes of a file of a format, which come once in it
_BEGINNINGS = {
    "asf": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),
    "wtv": bytes.fromhex("b7d800203749da11a64e0007e95ead8d"),
    "apng": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
}
_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of ASF: its object that has lengths
_PACKETS = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")  # and that of its packets
_TAGS = (8, 9, 18)  # of parts of an FLV
_AFTER = 4  # bytes behind each, which say how long it is
_FILLED = re.compile(rb"[^\0]")
_NOTE = 4096  # bytes that cameras and players put behind a file
_OF_FRAGMENTS = (b"moof", b"mfhd", b"traf", b"trun", b"mdat")
_PADDING = 1 << 26  # bytes behind a file that are looked at: recorders may have kept room for gigabytes
_SEGMENT = b"\x18\x53\x80\x67"  # of Matroska
_PARTITION = bytes.fromhex("060e2b34020501010d010201")  # of MXF; what follows says which
_FOOTER = 24  # bytes from the start of a partition's fields to the place of the footer
_HEAD = 65536
_ZEROS = 512  # in a row are no part of H.264, HEVC and JPEG
_CODES = 0xC4  # JPEG's mark of a table of codes
_DV_BLOCK = 12_000  # bytes of a sequence of DV, which begins with a header
_EIGHT = 8  # bytes of a chunk's head
_SLACK = 16  # bytes by which headers are wrong of files that are whole


class Bounds(NamedTuple):
    """What is wrong with a file by its format's own lengths and marks.

    Attributes:
        lacks: what lacks at its end, or None.
        behind: how many bytes behind its end hold another file.
        within: what else is lost, or None.
    """

    lacks: str | None
    behind: int
    within: str | None


def bounds(path: Path, kind: str, ends: Sequence[int], boxes: Iterable[tuple[bytes, int]]) -> Bounds:
    """Compare a file's length with what its format says.

    Args:
        path: the file.
        kind: FFmpeg's name of its container.
        ends: where its packets of video end, in the order of the file; -1 where that is not known.
        boxes: the outermost boxes of an MP4 with their places, looked at where it is one.

    Returns:
        What is wrong with it.
    """
    length = path.stat().st_size
    if not length:
        return Bounds(None, 0, None)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        stated = _stated(data, kind, ends)
        lacks = (
            f"{stated - length} bytes of it are missing" if stated > length + _SLACK else _unfinished(data, kind, ends)
        )
        behind = _behind(data, kind, boxes)
        return Bounds(None if behind else lacks, behind, _lost(data, kind, ends))


def _stated(data: mmap.mmap, kind: str, ends: Sequence[int]) -> int:
    """Return how long a file is by its own header; 0 where it does not say."""
    head = data[:_HEAD]
    if kind == "avi":
        return _riff_end(data)
    if kind.startswith("matroska"):
        place = head.find(_SEGMENT)
        if place < 0:
            return 0
        width = 9 - head[place + 4].bit_length() if head[place + 4] else 0
        size = int.from_bytes(head[place + 4 : place + 4 + width], "big") - (1 << 7 * width)
        return place + 4 + width + size if width and size < (1 << 7 * width) - 1 else 0
    if kind == "flv":
        place = head.find(b"\0\x08filesize\0")
        number = struct.unpack(">d", head[place + 11 : place + 19])[0] if place > 0 else 0.0
        return int(number) if 0 < number < 2**53 else 0
    if kind == "mxf" and head[:12] == _PARTITION:
        fields = 17 + (head[16] & 0x7F if head[16] & 0x80 else 0)
        return int.from_bytes(head[fields + _FOOTER : fields + _FOOTER + 8], "big")
    if kind == "dv" and len(ends) > 1 and ends[0] > 0:  # all frames have one length
        return -(-len(data) // ends[0]) * ends[0]
    return 0


def _riff_end(data: mmap.mmap) -> int:
    """Return where an AVI ends by its lengths, those of the parts that OpenDML adds included; 0 where it does not say.

    Lengths of a recording that was not finished are 0 or all ones, as are those that overflow.
    """
    head = data[:_HEAD]
    size, movi = int.from_bytes(head[4:8], "little"), head.find(b"movi")
    inner = int.from_bytes(head[movi - 4 : movi], "little") if movi > 0 else 0
    if head[:4] != b"RIFF" or not 0 < inner < size < 0x7FFFFFFF:
        return 0
    end = _EIGHT + size + size % 2
    while data[end : end + 4] == b"RIFF" and data[end + 8 : end + 12] == b"AVIX":
        size = int.from_bytes(data[end + 4 : end + 8], "little")
        if not 0 < size < 0x7FFFFFFF:
            return 0
        end += _EIGHT + size + size % 2
    return end


def whole_riff(path: Path) -> bool:
    """Return whether an AVI is as long as it says, and its parts follow one another to its end.

    Args:
        path: the file; of one that is no AVI nothing is known.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end, place = _riff_end(data), 0
        if end <= 0 or not -1 <= len(data) - end <= _SLACK:
            return False
        while place + _EIGHT <= end:
            name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
            if not name.strip().isalnum():
                return False
            listed = name == b"RIFF" or (name == b"LIST" and data[place + 8 : place + 12] in (b"movi", b"rec "))
            place += 12 if listed else _EIGHT + size + size % 2
        return place <= end + 1


def missing_fragments(path: Path) -> str:
    """Say whether fragments of an MP4 lack within it by their numbers, which elsewhere rise by one; "" where not.

    Args:
        path: the file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        numbers = [int.from_bytes(data[place + 20 : place + 24], "big") for place in _fragments(data)[0]]
    gaps = sum(later > before + 1 for before, later in pairwise(numbers))
    few = 0 < gaps <= max(1, len(numbers) // 10) and sorted(numbers) == numbers
    return "numbers of its fragments are missing" if few else ""


def _fragments(data: mmap.mmap) -> tuple[list[int], int]:
    """Return where the fragments of an MP4 begin, and where its outermost boxes end; nothing of one without any.

    A last box that has no pictures, an index of fragments say, is taken for whole.
    """
    places, place, length, fragmented = list[int](), 0, len(data), False
    while place + 8 <= length:
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        size = int.from_bytes(data[place + 8 : place + 16], "big") if size == 1 else size or length - place
        if size < 8 or not name.isalnum():
            break
        places += [place] if name == b"moof" else []
        fragmented = fragmented or (name == b"moov" and data.find(b"mvex", place, place + size) >= 0)
        place += size if name in (b"moof", b"mdat") else min(size, length - place)
    return (places, place) if fragmented else ([], 0)


def _is_note(data: mmap.mmap, place: int) -> bool:
    """Return whether what lies behind the last box of an MP4 is padding, or a little that programs put there."""
    short = len(data) - place <= _NOTE and not any(data.find(name, place) >= 0 for name in _OF_FRAGMENTS)
    return short or not _FILLED.search(data, place, place + _PADDING)


def _unfinished(data: mmap.mmap, kind: str, ends: Sequence[int]) -> str | None:
    """Say what a file lacks at its end whose format gives no length."""
    tail = data[-_HEAD:]
    if kind == "yuv4mpegpipe" and ends and 0 < ends[-1] < len(data) and tail[ends[-1] - len(data) :][:5] == b"FRAME":
        return "its last frame is not whole"
    if kind == "mjpeg" and len(ends) > 1 and b"\xff\xd9" not in data[ends[-2] : ends[-1]]:
        return "its last picture is not whole"
    if kind.startswith("mov") and (place := _fragments(data)[1]):
        if place < len(data) and not _is_note(data, place):
            return f"of its last {len(data) - place} bytes, which are no part of it, nothing is read"
        return f"{place - len(data)} bytes of its last part are missing" if place > len(data) else None
    if kind == "flv" and (more := _flv_end(data) - len(data)) > _AFTER:
        return f"{more} bytes of its last part are missing"
    if (kind == "apng" and b"IEND" not in tail) or (kind == "gif" and not _gif_blocks(data)[1]):
        return "it has no end"
    if kind == "mxf" and data[:12] == _PARTITION and (place := _stated(data, kind, ends)):
        return None if data[place : place + 12] == _PARTITION else "its end does not lie where its header says"
    return None


def _behind(data: mmap.mmap, kind: str, boxes: Iterable[tuple[bytes, int]]) -> int:
    """Return how many bytes at the end of a file are another one that begins there."""
    if kind.startswith("mov"):
        found = list(boxes)
        again = [k for k, (name, _) in enumerate(found) if name == b"moov"][1:]
        more = (
            _FILLED.search(data, found[-1][1], found[-1][1] + _PADDING) if found and found[-1][0] == bytes(4) else None
        )
        if more and data[more.start() + 1 : more.start() + 5] == b"ftyp":  # behind padding
            return len(data) - more.start() + 3
        if not again or any(name == b"moof" for name, _ in found):  # fragments of a second index are read
            return 0
        heads = [place for name, place in found[1 : again[0] + 1] if name == b"ftyp"]
        start = heads[0] if heads else found[again[0]][1]
        return len(data) - start
    if kind == "avi" and (end := _riff_end(data)):
        return len(data) - end if data[end : end + 4] == b"RIFF" else 0
    mark = _BEGINNINGS.get(kind)
    place = data.find(mark, len(mark)) if mark else -1
    return len(data) - place if place > 0 else 0


def _lost(data: mmap.mmap, kind: str, ends: Sequence[int]) -> str | None:
    """Say what a format's own counting shows to be lost within a file."""
    if kind == "asf":
        return _asf_packets(data)
    if kind == "gif":
        return _gif_blocks(data)[0]
    if kind == "dv":
        heads = np.frombuffer(data, np.uint8)[::_DV_BLOCK] >> 4  # a copy, so that the file can be closed
        bad = np.flatnonzero(heads != 1)
        return f"{len(bad)} of its {len(heads)} blocks are overwritten" if len(bad) else None
    if kind == "mjpeg":
        torn = [
            k
            for k, (start, end) in enumerate(pairwise((0, *ends)))
            if k + 1 < len(ends) and not _whole_jpeg(data[start:end])
        ]
        return f"{len(torn)} of its {len(ends)} pictures are not whole, the first is frame {torn[0]}" if torn else None
    if kind in ("h264", "hevc") and (place := data.find(bytes(_ZEROS))) >= 0 and any(data[place + _ZEROS :][: 1 << 20]):
        frame = int(np.searchsorted(np.array(ends), place, side="right"))
        return f"zeros in place of pictures near frame {frame}"
    return None


def _flv_end(data: mmap.mmap) -> int:
    """Return where the last part of an FLV ends by its own length; 0 where parts do not follow one another."""
    place = int.from_bytes(data[5:9], "big") + 4
    while place + 11 <= len(data):
        if data[place] & 31 not in _TAGS:
            return 0
        place += 11 + _AFTER + int.from_bytes(data[place + 1 : place + 4], "big")
    return place


def _gif_blocks(data: mmap.mmap) -> tuple[str | None, bool]:
    """Say where the blocks of a GIF do not follow one another, and whether they come to their end.

    Zeros between them are passed over, as players do, and what lies behind their end is not looked at.
    """
    frames, place = 0, 13 + (3 << (data[10] & 7) + 1 if len(data) > 13 and data[10] & 128 else 0)
    while place < len(data):
        mark, table = data[place], data[place + 9] if place + 9 < len(data) else 0
        if mark == 0:
            more = _FILLED.search(data, place)
            place = more.start() if more else len(data)
            continue
        if mark == 0x3B:
            return None, True
        if mark not in (0x21, 0x2C):
            return f"near frame {max(0, frames - 1)} it has bytes that are no part of a GIF", True
        frames += mark == 0x2C
        place += 2 if mark == 0x21 else 11 + (3 << (table & 7) + 1 if table & 128 else 0)
        while place < len(data) and data[place]:
            place += data[place] + 1
        place += 1
    return None, False


def _asf_packets(data: mmap.mmap) -> str | None:
    """Say how many of an ASF's packets, which have one length and one beginning, are overwritten."""
    place, start = data.find(_PROPERTIES, 0, _HEAD), data.find(_PACKETS, 0, _HEAD) + 50
    size = int.from_bytes(data[place + 92 : place + 96], "little")
    if place < 0 or start < 50 or not 3 < size <= len(data) - start or data[start : start + 3] != b"\x82\0\0":
        return None
    stated = int.from_bytes(data[start - 10 : start - 2], "little") or len(data)
    rows = np.frombuffer(data, np.uint8, min((len(data) - start) // size, stated) * size, start).reshape(-1, size)
    bad = int((rows[:, :3] != (0x82, 0, 0)).any(1).sum())
    number = len(rows)
    del rows  # so that the file can be closed
    return f"{bad} of its {number} packets are overwritten" if 0 < bad < number / 2 else None


def _whole_jpeg(picture: bytes) -> bool:
    """Return whether a picture has its end, and no zeros in place of its contents."""
    end = picture.rfind(b"\xff\xd9")
    return not picture or (end >= 0 and (bytes(_ZEROS) not in picture[:end] or _zeros_are_flat(picture)))


def _zeros_are_flat(picture: bytes) -> bool:
    """Return whether zeros stand for an area of one colour in a picture's codes: encoders may choose them by use."""
    place, codes = picture.find(b"\xff\xd8") + 2, list[int]()
    while picture[place : place + 1] == b"\xff" and picture[place + 1 : place + 2] not in (b"\xda", b""):
        end = place + 2 + int.from_bytes(picture[place + 2 : place + 4], "big")
        at = place + 4 if picture[place + 1] == _CODES else end
        while at + 17 < end:
            codes.append(picture[at + 17])  # the first of a table's is all zeros; 0 is no change, or no more of a block
            at += 17 + sum(picture[at + 1 : at + 17])
        place = max(end, place + 2)
    return bool(codes) and not any(codes)
