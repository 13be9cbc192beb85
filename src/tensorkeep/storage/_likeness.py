"""Archives that are another one again but for the data in one entry: told by their bytes, without parsing them anew.

A DCP folder has an archive for every chunk, and those of one dtype and shape differ in their data and its CRC-32 alone.
"""

from __future__ import annotations

from typing import NamedTuple

_END = b"PK\x05\x06"  # begins the last 22 bytes of a zip without a comment
_LONGEST = 1 << 14  # bytes beside the data of an archive that is remembered


class Likeness(NamedTuple):
    """What an archive that was parsed is made of beside the data of one entry.

    Attributes:
        data: where the data begins in the archive.
        end: where it ends.
        rest: what lies before and behind it, with zeros for the CRC-32 of the data.
        places: where in `rest` that CRC-32 stands.
    """

    data: int
    end: int
    rest: bytes
    places: tuple[int, ...]

    def crc_of(self, rest: bytes) -> int | None:
        """Return the CRC-32 of the data of an archive with such a rest; None where it differs in anything else."""
        if not self.places:
            return 0 if rest == self.rest else None
        crc = rest[self.places[0] : self.places[0] + 4]
        masked = bytearray(rest)
        for at in self.places:
            if rest[at : at + 4] != crc:
                return None
            masked[at : at + 4] = bytes(4)
        return int.from_bytes(crc, "little") if masked == self.rest else None


def likeness(rest: bytes, data: int, end: int, crc: int) -> Likeness | None:
    """Remember an archive; None where others cannot be told from it by these bytes.

    Args:
        rest: what lies before and behind the data.
        data: where the data begins in the archive.
        end: where it ends.
        crc: the CRC-32 of the data as the archive says, 0 where it says none.
    """
    if len(rest) > _LONGEST or rest[-22:-18] != _END or len(rest) - data < 22:
        return None
    places, masked, mark = [], bytearray(rest), crc.to_bytes(4, "little")
    at = rest.find(mark) if crc else -1
    while at >= 0:
        places.append(at)
        masked[at : at + 4] = bytes(4)
        at = rest.find(mark, at + 4)
    return Likeness(data, end, bytes(masked), tuple(places)) if places or not crc else None
