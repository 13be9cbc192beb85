"""Compare parts of a Matroska file with the checksums that it may have of them: decoders do not look at those.

FFmpeg writes one of each cluster, but not for WebM. A part whose bytes do not give its sum was damaged after it was
written, whatever a decoder makes of it. A cluster holds pictures and sound: its sum does not say which are damaged.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"  # of Matroska
_SUM = b"\xbf\x84"  # its element of a checksum, and that it has four bytes
_PIECE = 1 << 20


def wrong_sums(path: Path, kind: str, ends: Sequence[int]) -> str | None:
    """Say how many parts of a file are not what they were when it was written.

    Args:
        path: the file.
        kind: FFmpeg's name of its container.
        ends: where its packets of video end, in the order of the file; -1 where that is not known.

    Returns:
        How many, and near which frame the first is; None where all are right or there are none.

    Example:
        >>> wrong_sums(Path("clip.mkv"), "matroska,webm", ends)  # doctest: +SKIP
        'the checksums of 1 of its 12 parts do not fit, in pictures or in sound, the first near frame 96'
    """
    if not kind.startswith("matroska"):
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        known = list(_clusters(data))
    wrong = [place for place, right in known if not right]
    if not wrong:
        return None
    frame = int(np.searchsorted(np.maximum.accumulate(np.array([0, *ends])), wrong[0], side="right")) - 1
    what = f"the checksums of {len(wrong)} of its {len(known)} parts do not fit, in pictures or in sound"
    return f"{what}, the first near frame {frame}"


def _clusters(data: mmap.mmap) -> Iterator[tuple[int, bool]]:
    """Give the clusters of a Matroska file that have a sum or are cut off, and whether each is right."""
    place = data.find(_SEGMENT)
    while 0 <= place <= len(data) - 12:
        name, width = _width(data[place]), 0
        if name and place + name < len(data):
            width = _width(data[place + name])
        if not width:
            place = data.find(_CLUSTER, place + 1)
            continue
        body = place + name + width
        size = int.from_bytes(data[place + name : body], "big") - (1 << 7 * width)
        open_ended = size == (1 << 7 * width) - 1 or data[place : place + 4] == _SEGMENT
        end = body if open_ended else body + size
        if data[place : place + 4] == _CLUSTER and end > len(data):
            yield place, False
        elif data[place : place + 4] == _CLUSTER and data[body : body + 2] == _SUM and size >= 6 and end > body:
            yield place, _sum(data, body + 6, end) == int.from_bytes(data[body + 2 : body + 6], "little")
        place = end


def _width(first: int) -> int:
    """Return how many bytes a number of Matroska's takes that begins with this one; 0 where none does."""
    return 9 - first.bit_length() if first else 0


def _sum(data: mmap.mmap, start: int, end: int) -> int:
    """Return the CRC-32 of a part of a file, a piece at a time."""
    made = 0
    for place in range(start, end, _PIECE):
        made = zlib.crc32(data[place : min(end, place + _PIECE)], made)
    return made
