"""Times as people write them into tables: 4.5, 4,5, 1:04.5, 0:01:04, and nothing that could be meant in two ways."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,3}):(\d{1,2}(?:[.,]\d+)?)")
_CODE = re.compile(r"\d{1,2}:\d{2}:\d{2}[:;]\d{2,3}")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?|[.,]\d+")
_GROUPS = re.compile(r"\d{1,3},\d{3}")


def spelled(text: str, comma: bool) -> tuple[float, bool]:
    """Return the number that a cell says, and whether it was written as a clock (minutes:seconds, hours before).

    Args:
        text: the cell.
        comma: whether a comma stands before the decimals; see `decimal_comma`.

    Returns:
        The number; of a clock its seconds.

    Raises:
        ValueError: The cell is no time; the text says why.

    >>> spelled("1:04.5", comma=False), spelled("4,25", comma=True), spelled("90", comma=False)
    ((64.5, True), (4.25, False), (90.0, False))
    """
    text = text.strip()
    if not text:
        raise ValueError("is empty")
    if _CODE.fullmatch(text):
        raise ValueError(f"{text!r} is a time code that ends in frames: write seconds, 1:04.5 or frames")
    if re.search(r"[0-9]\s*[AaPp]\.?[Mm]", text):
        raise ValueError(f"{text!r} is a time of day: give the cells the format 'text' and write 0:01:04.5")
    if "," in text and not comma:
        raise ValueError(f"{text!r} has a comma, other times have a point: which of them is before the decimals?")
    if found := _CLOCK.fullmatch(text):
        hours, minutes, seconds = int(found[1] or 0), int(found[2]), float(found[3].replace(",", "."))
        if seconds >= 60 or (found[1] and minutes >= 60):
            raise ValueError(f"{text!r} is no time: there are 60 seconds in a minute, and 60 minutes in an hour")
        return hours * 3600 + minutes * 60 + seconds, True
    if not _NUMBER.fullmatch(text):
        what = "is negative" if re.fullmatch(r"-\s*[\d.,:]+", text) else "is no time: write 64.5, 1:04.5 or 0:01:04.5"
        raise ValueError(f"{text[:40]!r} {what}")
    return float(text.replace(",", ".")), False


def decimal_comma(cells: Iterable[tuple[str, str]], between_commas: bool) -> bool:
    """Return whether the times of a table have a comma before their decimals.

    Args:
        cells: place and text of every time.
        between_commas: whether commas part the columns too, so that such a cell stands in quotes.

    Returns:
        False where there is no comma in any of them.

    Raises:
        ValueError: Some have a comma and some a point, or the commas may part thousands; the text names a place.

    >>> decimal_comma([("row 2", "4,5"), ("row 3", "12")], False), decimal_comma([("row 2", "4.5")], True)
    (True, False)
    """
    commas, points = [], []
    for place, text in cells:
        if "," in text:
            commas.append((place, text.strip()))
        if "." in text:
            points.append((place, text.strip()))
    if not commas:
        return False
    if points:
        one, other = commas[0], points[0]
        raise ValueError(
            f"{one[0]}: {one[1][:20]!r} has a comma and {other[0]}: {other[1][:20]!r} a point: which is before the "
            "decimals?"
        )
    if between_commas and all(_GROUPS.fullmatch(text) for _, text in commas):
        raise ValueError(f"{commas[0][0]}: {commas[0][1]!r} may be thousands or decimals: write it without a comma")
    return True


def both_ends(text: str) -> tuple[str, str]:
    """Return start and end of a cell that holds both: `[4.5, 9.1]`, `4.5 - 9.1`, `0:04-0:09`.

    Args:
        text: the cell.

    Raises:
        ValueError: It does not hold two times.

    >>> both_ends("[4.5, 9.1]"), both_ends("0:04 - 0:09")
    (('4.5', '9.1'), ('0:04', '0:09'))
    """
    inner = text.strip()
    if inner[:1] in "[(" and inner[-1:] in "])":
        inner = inner[1:-1]
    for part in (r"\s*;\s*", r"\s*(?:-|–|—|~|\bto\b)\s*", r"\s*,\s*"):
        found = re.split(part, inner.strip())
        if len(found) == 2 and all(found):
            return found[0], found[1]
    raise ValueError(f"{text[:40]!r} does not hold a start and an end: write [4.5, 9.1] or 4.5 - 9.1")
