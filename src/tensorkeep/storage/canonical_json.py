"""JSON in one spelling only, as RFC 8785 has it: equal values give equal bytes, whoever wrote them and how.

Beyond the RFC: a whole number that no double holds is rounded to the nearest, as JavaScript reads it, and the words
NaN, Infinity and -Infinity, which Python writes and JSON does not know, stand as they are.
"""

from __future__ import annotations

import json
import math
from typing import Any

_WORDS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def canonical(value: Any) -> bytes:
    r"""Return a value in its canonical spelling.

    Args:
        value: dicts with text keys, lists, texts, numbers, booleans, None.

    Returns:
        The spelling as UTF-8.

    Raises:
        ValueError: a text holds half of a surrogate pair.
        TypeError: a value that JSON does not have.

    Example:
        >>> canonical({"b": 1.0, "a": [1e-5, None, "\u20ac"]}).decode()
        '{"a":[0.00001,null,"€"],"b":1}'
    """
    return _spelled(value).encode("utf-8")


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))  # by UTF-16 code units
        return "{" + ",".join(f"{_text(name)}:{_spelled(value[name])}" for name in names) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spelled, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return _number(value)
    raise TypeError(f"JSON has no {type(value).__name__}")


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is a {type(value).__name__}")
    return json.dumps(value, ensure_ascii=False)


def _number(value: int | float) -> str:
    """Return a number as JavaScript prints it."""
    try:
        number = float(value)
    except OverflowError:
        number = math.copysign(math.inf, value)
    if not math.isfinite(number):
        return _WORDS[str(number)]
    if number == 0:
        return "0"
    sign, digits, exponent = "-" if number < 0 else "", *_digits(abs(number))
    point = len(digits) + exponent  # where the decimal point stands, counted from the first digit
    if len(digits) <= point <= 21:
        return sign + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    mantissa = digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "")
    return f"{sign}{mantissa}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def _digits(number: float) -> tuple[str, int]:
    """Return the fewest digits that tell a positive number from its neighbours, and the exponent behind them."""
    mantissa, _, exponent = repr(number).partition("e")
    whole, _, part = mantissa.partition(".")
    part = "" if part == "0" else part
    digits, power = whole + part, int(exponent or 0) - len(part)
    stripped = digits.rstrip("0")
    return stripped.lstrip("0"), power + len(digits) - len(stripped)
