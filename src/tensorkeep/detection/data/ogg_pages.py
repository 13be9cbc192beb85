"""What lacks or is damaged in an Ogg file by its pages: each has a number, a checksum, and the last one a mark.

A page belongs to one stream: what is lost of sound alone is no damage to pictures, and is passed over.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MARK = b"OggS\0"
_HEAD = 27  # bytes of a page before the lengths of its parts
_GOES_ON = 255  # length of a page's last part where the next page has more of it
_FIRST, _LAST = 2, 4  # flags of a stream's first page, and of its last
_SHOWN = (b"\x80theora", b"OVP80")  # what a stream of pictures begins with
# what streams begin with that hold no pictures
_OTHERS = (
    b"\x01vorbis",
    b"OpusHead",
    b"\x7fFLAC",
    b"fLaC",
    b"Speex   ",
    b"PCM     ",
    b"fishead\0",
    b"CMML",
    b"\x80kate",
)
_ONES = 0xFFFFFFFF
_TURNED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # each byte with its bits in the other order


class _Page(NamedTuple):
    """A page of an Ogg file.

    Attributes:
        place: where it lies.
        serial: number of its stream.
        number: of the page in its stream.
        flags: 2: the stream's first, 4: its last.
        start: where its contents begin.
        end: where they end, by their lengths.
    """

    place: int
    serial: int
    number: int
    flags: int
    start: int
    end: int


def odd_pages(path: Path, ends: Sequence[int]) -> tuple[str | None, str | None]:
    """Say what an Ogg file lacks at its end, and what is lost or damaged of its pictures within it.

    Args:
        path: the file.
        ends: where its packets of video end, in the order of the file; -1 where that is not known.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        heard, shown = _kinds(data)
        last, before, wrong, checked, gaps = dict[int, int](), dict[int, int](), list[int](), 0, 0
        complete = False  # a recording that was stopped ends with a page like any other
        for page in _pages(data):
            last[page.serial] = page.flags & _LAST
            complete = page.end == len(data) and data[page.start - 1] != _GOES_ON
            if page.serial in heard:
                continue
            number = before.get(page.serial)
            gaps += number not in (None, page.number - 1) and not page.flags & _FIRST
            before[page.serial] = page.number
            if page.end <= len(data):
                checked += 1
                wrong += [] if _right(data, page) else [page.place]
    ended = [last[serial] for serial in shown or last]
    lacks = "it has no last page" if ended and not any(ended) and not complete else None
    if gaps:
        return lacks, f"numbers of its pages are missing at {gaps} places"
    if not wrong:
        return lacks, None
    frame = int(np.searchsorted(np.maximum.accumulate(np.array([0, *ends])), wrong[0], side="right")) - 1
    what = f"the checksums of {len(wrong)} of its {checked} parts with pictures do not fit"
    return lacks, f"{what}, the first near frame {frame}"


def _pages(data: mmap.mmap) -> Iterator[_Page]:
    """Give the pages of an Ogg file, found by their marks: the lengths of a damaged one lead astray."""
    place = data.find(_MARK)
    while 0 <= place <= len(data) - _HEAD:
        head = data[place : place + _HEAD]
        parts = data[place + _HEAD : place + _HEAD + head[26]]
        serial, number = struct.unpack("<II", head[14:22])
        start = place + _HEAD + len(parts)
        yield _Page(place, serial, number, head[5], start, start + sum(parts))
        place = data.find(_MARK, place + _HEAD)


def _kinds(data: mmap.mmap) -> tuple[set[int], set[int]]:
    """Return the numbers of streams that hold sound or words, and those of pictures, by their first pages."""
    heard, shown = set[int](), set[int]()
    for page in _pages(data):
        if page.flags & _FIRST:
            name = data[page.start : page.start + 8]
            heard |= {page.serial} if name.startswith(_OTHERS) and _right(data, page) else set()
            shown |= {page.serial} if name.startswith(_SHOWN) else set()
    return heard, shown


def _right(data: mmap.mmap, page: _Page) -> bool:
    """Return whether a page gives its sum: a CRC-32 that begins at 0, bits in order."""
    whole = data[page.place : page.place + 22] + bytes(4) + data[page.place + 26 : page.end]
    made = zlib.crc32(whole.translate(_TURNED), _ONES) ^ _ONES
    stated = int.from_bytes(data[page.place + 22 : page.place + 26], "little")
    return int(f"{made:032b}"[::-1], 2) == stated
