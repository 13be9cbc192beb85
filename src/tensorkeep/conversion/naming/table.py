"""Match names against tables: a row pairs a naming's name with the hf name, and says how the tensors differ.

`{n}` stands for a layer's number, `{e}` for an expert's. A row names a module; the last segment (`weight`, `bias`,
...) is carried over.

| field | says |
|---|---|
| `rope` | rows of these projections (and of the norms on them) follow the RoPE layout |
| `stacked` | the naming keeps all experts of hf in one tensor, expert first |
| `exact` | both names stand whole, without a last segment to carry over |
| `piece` | the naming's tensor is one piece of hf's |
| `joined` | hf's tensor is one piece of the naming's |
| `turned` | rows and columns have changed places, in each matrix of a stack |
| `plus` | the naming's values are hf's and this |
| `flat` | the naming's tensor is hf's with all dimensions but the first in one; a word of `hub_links.SHAPES` |
| `scope` | the section of the config that the sizes of heads are taken from |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError

_MOST_EXPERTS = 100_000


class Cut(NamedTuple):
    """One piece of a tensor: the rule that says how large the pieces are, its place, and the dimension that is cut.

    Args:
        rule: a word of `hub_links.SIZES`.
        number: of the piece, from 0.
        axis: 0, or 1 for rows of every matrix of a stack.
    """

    rule: str
    number: int
    axis: int = 0


class Row(NamedTuple):
    """One row of a naming's table: its own name, the hf name, and how the tensors differ."""

    own: str
    hf: str
    rope: bool = False
    stacked: bool = False
    exact: bool = False
    piece: Cut | None = None
    joined: Cut | None = None
    turned: bool = False
    plus: int = 0
    flat: str = ""
    scope: str = ""


class Link(NamedTuple):
    """One stored name and its hf name.

    Args:
        own: the naming's name.
        hf: the hf name.
        rope: whether rows follow the RoPE layout.
        expert: the slice of a stacked tensor that the hf tensor is; None where nothing is stacked.
        row: the table's row that pairs them.
    """

    own: str
    hf: str
    rope: bool = False
    expert: int | None = None
    row: Row = Row("", "")


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
        The hf name, or one for each expert of a stacked tensor or piece of a joined one; None where no row fits.

    Raises:
        TensorkeepError: the name's numbers are out of all proportion.
    """
    for row in rows:
        leaf = not (row.stacked or row.exact)
        match = _pattern(row.own, leaf).match(name)
        if match:
            found = match.groupdict()
            if not row.stacked:
                same = [r for r in rows if r.own == row.own] if row.joined else [row]
                return [Link(name, _fill(r.hf, found, leaf), r.rope, None, r) for r in same]
            if experts > _MOST_EXPERTS:  # an empty tensor may have any number of rows
                raise TensorkeepError(
                    f"{name} stacks {experts} experts; the most believed is {_MOST_EXPERTS}", code="F07"
                )
            return [
                Link(name, _fill(row.hf, {**found, "e": str(e), "leaf": "weight"}, True), row.rope, e, row)
                for e in range(experts)
            ]
    return None


def from_hf(name: str, rows: Sequence[Row]) -> list[Link] | None:
    """Look an hf name up in a naming's table.

    Args:
        name: an hf name.
        rows: the naming's table.

    Returns:
        The naming's own name for it, or one for each piece that it is cut into; None where no row fits.
    """
    for row in rows:
        match = _pattern(row.hf, not row.exact).match(name)
        if match:
            found = match.groupdict()
            if row.stacked and found["leaf"] != "weight":
                continue
            same = [r for r in rows if r.hf == row.hf] if row.piece else [row]
            expert = int(found["e"]) if row.stacked else None
            return [Link(_fill(r.own, found, not (r.stacked or r.exact)), name, r.rope, expert, r) for r in same]
    return None


def matcher(rows: Iterable[Row]) -> Callable[[str], bool]:
    """Return a function that says whether any row of a table has an (own) name, by one expression for all of them.

    >>> matcher([Row("blocks.{n}.norm", "model.layers.{n}.norm")])("blocks.7.norm.weight")
    True
    """
    names = [(row.own, not (row.stacked or row.exact)) for row in rows]

    @cache
    def whole() -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{re.sub(r'[(][?]P<[a-z]+>', '(?:', _pattern(*n).pattern)})" for n in names))

    return lambda name: whole().match(name) is not None
