"""The pages of an Ogg file: each has a checksum and belongs to one stream, so that damage to sound alone is known."""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_MARK = b"OggS\0"
_HEAD = 27  # bytes of a page before the lengths of its parts
_FIRST = 2  # flag of a stream's first page
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


class Page(NamedTuple):
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


def pages(data: mmap.mmap) -> Iterator[Page]:
    """Give the pages of an Ogg file, found by their marks: the lengths of a damaged one lead astray."""
    place = data.find(_MARK)
    while 0 <= place <= len(data) - _HEAD:
        head = data[place : place + _HEAD]
        parts = data[place + _HEAD : place + _HEAD + head[26]]
        start = place + _HEAD + len(parts)
        yield Page(place, *struct.unpack("<II", head[14:22]), head[5], start, start + sum(parts))
        place = data.find(_MARK, place + _HEAD)


def without_pictures(data: mmap.mmap) -> set[int]:
    """Return the numbers of an Ogg file's streams that hold sound or words by their first pages, which are whole."""
    firsts = [page for page in pages(data) if page.flags & _FIRST and right(data, page)]
    return {page.serial for page in firsts if data[page.start : page.start + 8].startswith(_OTHERS)}


def right(data: mmap.mmap, page: Page) -> bool:
    """Return whether a page gives its sum: a CRC-32 that begins at 0, bits in order."""
    whole = data[page.place : page.place + 22] + bytes(4) + data[page.place + 26 : page.end]
    made = zlib.crc32(whole.translate(_TURNED), _ONES) ^ _ONES
    stated = int.from_bytes(data[page.place + 22 : page.place + 26], "little")
    return int(f"{made:032b}"[::-1], 2) == stated
