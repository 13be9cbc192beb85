"""The end of a zip archive: torch and Python must find the same directory by it, or each would read other tensors.

Python looks for the directory right before the records at the end, whatever place they name; torch goes to the named
place. An archive with another one before it is then two models, one for each.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence

_END, _LOCATOR, _WIDE = (b"PK\x05\x06", 22), (b"PK\x06\x07", 20), (b"PK\x06\x06", 56)  # signature, bytes
_LONGEST = _END[1] + _LOCATOR[1] + _WIDE[1]
UTF8 = 1 << 11  # flag of an entry: how its name is spelled
_ENTRY = 46  # bytes of one in the directory, before its name


def end_bytes(entries: Sequence[zipfile.ZipInfo]) -> int:
    """Return how many bytes at the end `wrong_end` looks at: the records, and the directory's last entry.

    Args:
        entries: what Python found.
    """
    return _LONGEST + (_ENTRY + sum(_lengths(entries[-1])) if entries else 0)


def _lengths(entry: zipfile.ZipInfo) -> tuple[int, int, int]:
    """Return the bytes of an entry's name, extra fields and comment that are there."""
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF8 else "cp437")
    return len(name), len(entry.extra), len(entry.comment)


def wrong_end(tail: bytes, length: int, entries: Sequence[zipfile.ZipInfo]) -> str | None:
    """Say what is wrong with the records at the end of an archive; None where they name the place they stand at.

    Args:
        tail: the last `end_bytes` of the archive, or all of it.
        length: bytes of the archive.
        entries: what Python found, which looks at neither their number nor that of disks nor where the last one ends;
            torch does.
    """
    end = tail[-_END[1] :]
    if len(end) < _END[1] or end[:4] != _END[0] or end[-2:] != b"\0\0":
        return "bytes lie behind its end"
    disk, first, here, count, size, offset = struct.unpack("<HHHHII", end[4:20])
    stands = length - _END[1]
    locator, wide = tail[-_END[1] - _LOCATOR[1] : -_END[1]], tail[-_LONGEST : -_END[1] - _LOCATOR[1]]
    if locator[:4] == _LOCATOR[0]:
        stands = length - _LONGEST
        (named,) = struct.unpack("<Q", locator[8:16])
        if named != stands or len(wide) < _WIDE[1] or wide[:4] != _WIDE[0]:
            return "its end names the directory of another archive"
        record, _, disk, first, here, count, size, offset = struct.unpack("<QIIIQQQQ", wide[4:56])
        if record != _WIDE[1] - 12:  # all of it but signature and this number
            return "its end has no known form"
    if offset + size != stands:
        return "its end names a directory that is not there: another archive may lie before it"
    if disk or first or not here == count == len(entries):
        return f"its end names {count} entries, of disk {disk}; {len(entries)} are there"
    lengths = _lengths(entries[-1]) if entries else ()
    last = tail[: len(tail) - (length - stands)][-_ENTRY - sum(lengths) :]
    if entries and last[28:34] != struct.pack("<HHH", *lengths):
        return "its directory ends within an entry"
    return None
