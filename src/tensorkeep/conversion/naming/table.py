"""Match names against tables: a row pairs a naming's name with the hf name, and says how rows or experts differ.

`{n}` stands for a layer's number, `{e}` for an expert's. A row names a module; the last segment (`weight`, `bias`,
...) is carried over. `rope` marks projections (and the norms on them) whose rows follow the RoPE layout. `stacked`
means that the naming keeps all experts of hf in one tensor, expert first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError

_MOST_EXPERTS = 100_000


class Row(NamedTuple):
    """One row of a naming's table: its own name, the hf name, and how the tensors differ."""

    own: str
    hf: str
    rope: bool = False
    stacked: bool = False


class Link(NamedTuple):
    """One stored name and its hf name; `expert` is the slice of a stacked tensor that the hf tensor is."""

    own: str
    hf: str
    rope: bool = False
    expert: int | None = None


@cache
def _pattern(text: str, leaf: bool) -> re.Pattern[str]:
    """Return the regular expression of a table's name, with or without a last segment."""
    body = re.escape(text).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(body + (r"\.(?P<leaf>[A-Za-z_0-9]+)" if leaf else "") + r"\Z")


def _fill(text: str, found: dict[str, str], leaf: bool) -> str:
    """Put the matched numbers and the last segment into the other naming's name."""
    made = text.replace("{n}", found.get("n", "")).replace("{e}", found.get("e", ""))
    return f"{made}.{found['leaf']}" if leaf else made


def from_own(name: str, rows: Sequence[Row], experts: int = 0) -> list[Link] | None:
    """Look a naming's own name up in its table.

    Args:
        name: a clean stored name.
        rows: the naming's table.
        experts: how many experts a stacked tensor holds, which is its first dimension.

    Returns:
        The hf name, or one for each expert of a stacked tensor; None where no row fits.

    Raises:
        TensorkeepError: the name's numbers are out of all proportion.
    """
    for row in rows:
        match = _pattern(row.own, not row.stacked).match(name)
        if match:
            found = match.groupdict()
            if not row.stacked:
                return [Link(name, _fill(row.hf, found, True), row.rope)]
            if experts > _MOST_EXPERTS:  # an empty tensor may have any number of rows
                raise TensorkeepError(
                    f"{name} stacks {experts} experts; the most believed is {_MOST_EXPERTS}", code="F07"
                )
            return [
                Link(name, _fill(row.hf, {**found, "e": str(e), "leaf": "weight"}, True), row.rope, e)
                for e in range(experts)
            ]
    return None


def from_hf(name: str, rows: Sequence[Row]) -> Link | None:
    """Look an hf name up in a naming's table.

    Args:
        name: an hf name.
        rows: the naming's table.

    Returns:
        The naming's own name for it; None where no row fits.
    """
    for row in rows:
        match = _pattern(row.hf, True).match(name)
        if match:
            found = match.groupdict()
            if not row.stacked:
                return Link(_fill(row.own, found, True), name, row.rope)
            if found["leaf"] == "weight":
                return Link(_fill(row.own, found, False), name, row.rope, int(found["e"]))
    return None


def fits(name: str, rows: Iterable[Row]) -> bool:
    """Whether any row of a table has this (own) name."""
    return any(_pattern(row.own, not row.stacked).match(name) for row in rows)
