"""The end of a zip archive: torch and Python must find the same directory by it, or each would read other tensors.

Python looks for the directory right before the records at the end, whatever place they name; torch goes to the named
place. An archive with another one before it is then two models, one for each.
"""

from __future__ import annotations

import struct

_END, _LOCATOR, _WIDE = (b"PK\x05\x06", 22), (b"PK\x06\x07", 20), (b"PK\x06\x06", 56)  # signature, bytes
LONGEST = _END[1] + _LOCATOR[1] + _WIDE[1]


def wrong_end(tail: bytes, length: int) -> str | None:
    """Say what is wrong with the records at the end of an archive; None where they name the place they stand at.

    Args:
        tail: the last LONGEST bytes of the archive, or all of it.
        length: bytes of the archive.
    """
    end = tail[-_END[1] :]
    if len(end) < _END[1] or end[:4] != _END[0] or end[-2:] != b"\0\0":
        return "bytes lie behind its end"
    size, offset = struct.unpack("<II", end[12:20])
    stands = length - _END[1]
    locator, wide = tail[-_END[1] - _LOCATOR[1] : -_END[1]], tail[-LONGEST : -_END[1] - _LOCATOR[1]]
    if locator[:4] == _LOCATOR[0]:
        stands = length - LONGEST
        (named,) = struct.unpack("<Q", locator[8:16])
        if named != stands or len(wide) < _WIDE[1] or wide[:4] != _WIDE[0]:
            return "its end names the directory of another archive"
        size, offset = struct.unpack("<QQ", wide[40:56])
    if offset + size != stands:
        return "its end names a directory that is not there: another archive may lie before it"
    return None
