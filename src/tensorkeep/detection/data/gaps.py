"""What lacks within a file in which no picture is shown for a while, by how its format counts its own parts.

A pause is no damage: a screen that stays has one. Packets of a program stream follow one another by their lengths, and
pictures and sounds of ASF are numbered: where neither breaks off, nothing is lost.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

_PACK = b"\0\0\1\xba"  # of a program stream; one less is its end, above are packets
_MARK = re.compile(b"\0\0\1[\xb9-\xff]")
_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of ASF: its object that has lengths
_PACKETS = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")  # and that of its packets
_HEAD = 65536
_LEAST, _MOST = 32, 1 << 20  # bytes of a packet of ASF
_WIDTHS = (0, 1, 2, 4)  # bytes of a number, by two bits


def missing_parts(path: Path, kind: str) -> str:
    """Say what lacks within a file; "" where nothing does or the format does not say.

    Args:
        path: the file.
        kind: FFmpeg's name of its container.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if kind == "mpeg" and (stray := _stray_bytes(data)):
            return f"{stray} bytes of the file belong to no packet"
        if kind == "asf" and (torn := _torn_packets(data)):
            return f"contents of {torn} of its packets are missing"
    return ""


def _stray_bytes(data: mmap.mmap) -> int:
    """Return how many bytes of an MPEG program stream are none of a packet by the lengths of its packets.

    What lies before the first pack is not counted: a recording that was cut begins anywhere.
    """
    stray, place, length = 0, data.find(_PACK), len(data)
    while 0 <= place < length - 14:
        head = data[place : place + 14]
        if head[:3] != _PACK[:3] or head[3] < _PACK[3] - 1:
            found = _MARK.search(data, place)
            end = found.start() if found else length
            stray, place = stray + end - place, end
        elif head[3] == _PACK[3]:
            place += 14 + (head[13] & 7) if head[4] & 0x40 else 12
        else:
            place += 4 if head[3] == _PACK[3] - 1 else 6 + int.from_bytes(head[4:6], "big")
    return stray


def _torn_packets(data: mmap.mmap) -> int:
    """Return before or in how many packets of an ASF a picture or a sound breaks off or a number is left out."""
    place, start = data.find(_PROPERTIES, 0, _HEAD), data.find(_PACKETS, 0, _HEAD) + 50
    size = int.from_bytes(data[place + 92 : place + 96], "little")
    if place < 0 or start < 50 or not _LEAST <= size <= _MOST:
        return 0
    stated = int.from_bytes(data[start - 10 : start - 2], "little")
    end = min(len(data), start + stated * size if stated else len(data))
    torn = 0
    known: dict[
        int, tuple[int, int, int]
    ] = {}  # of a stream: number of its object, bytes that were there, and its length
    for at in range(start, end - size + 1, size):
        whole = True
        for stream, number, offset, length, total in _payloads(data[at : at + size]):
            if stream < 0:
                whole, known = False, {}
                break
            before = known.get(stream)
            if before and number == before[0]:
                whole = whole and offset == before[1]
            elif before:
                whole = whole and number == (before[0] + 1) % 256 and offset == 0 and before[1] >= before[2]
            known[stream] = (number, offset + length, total)
        torn += not whole
    return torn


def _payloads(packet: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Give of each part of an ASF packet: stream, number, offset, length, and the length of the whole.

    One with stream -1 ends those of a packet whose lengths do not fit; nothing comes of one coded in a rarer way.
    """
    place = 1 + (packet[0] & 15) if packet[0] & 128 else 0
    flags, widths = packet[place], packet[place + 1]

    def number(bits: int) -> int:
        nonlocal place
        width = _WIDTHS[bits & 3]
        place += width
        return int.from_bytes(packet[place - width : place], "little")

    place += 2
    if widths != 0x5D:
        return
    end = number(flags >> 5) or len(packet)
    number(flags >> 1)
    end = min(end, len(packet)) - number(flags >> 3)
    place += 6
    count, width = (packet[place] & 63, packet[place] >> 6) if flags & 1 and place < len(packet) else (1, 0)
    place += flags & 1
    for _ in range(count):
        if place + 7 > end:
            yield -1, 0, 0, 0, 0
            return
        stream, which, offset, extra = packet[place] & 127, packet[place + 1], *_number_pair(packet, place + 2)
        place += 7
        if extra == 1:  # many small ones in one part
            return
        total = int.from_bytes(packet[place : place + 4], "little") if extra >= 8 else 0
        place += extra
        length = number(width) if flags & 1 else end - place
        if length < 0 or place + length > end:
            yield -1, 0, 0, 0, 0
            return
        place += length
        yield stream, which, offset, length, total


def _number_pair(packet: bytes, place: int) -> tuple[int, int]:
    """Return a number of four bytes, and the one of one byte behind it."""
    return int.from_bytes(packet[place : place + 4], "little"), packet[place + 4]
