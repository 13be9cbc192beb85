"""Read JSON and text files that may hold anything: the value asked for, or one error that says where it is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import check_json, read_small
from tensorkeep.storage.certificate import unique


def read_json(path: Path) -> object:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        The value: dicts, lists, texts, numbers, booleans, None.

    Raises:
        TensorkeepError: The file is missing or no JSON; the error says at which line and column it stops being JSON.
    """
    try:
        text = read_text(path)
        check_json(text.encode(), path)
        document: object = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise TensorkeepError(
            f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}",
            where=path,
            hint="the file may be cut short",
        ) from problem
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits, nesting without end
        raise TensorkeepError(f"JSON that cannot be read: {problem}", where=path) from problem
    return document


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Args:
        path: the file.

    Raises:
        TensorkeepError: The file is missing or holds bytes that are no UTF-8.
    """
    try:
        return read_small(path).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise TensorkeepError("not a text file (bytes that are no UTF-8)", where=path) from problem


def parse_number(value: object, what: str, where: str) -> float:
    """Return a JSON value or a word of text as a finite float.

    Args:
        value: what stands in the file.
        what: what the number means there, for the error.
        where: the file, for the error.

    Raises:
        TensorkeepError: The value is not a finite number.
    """
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise TensorkeepError(f"{what} is not a finite number: {str(value)[:40]!r}", where=where)
    return number


def parse_segment(value: object, what: str, where: str) -> tuple[float, float]:
    """Return the start and end that a JSON list `[start, end]` of two numbers gives.

    Args:
        value: what the document holds.
        what: what it is, for errors.
        where: the document, for errors.

    Raises:
        TensorkeepError: The value is no such list; the error names `what` and `where`.
    """
    if not isinstance(value, list) or len(value) != 2:
        raise TensorkeepError(f"{what} is not [start, end]: {str(value)[:60]}", where=where)
    return parse_number(value[0], f"start of {what}", where), parse_number(value[1], f"end of {what}", where)
