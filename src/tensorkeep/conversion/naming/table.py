"""Tables of names: a row pairs a scheme's name with the hf name, and says whether rows or experts move.

`{n}` is a layer, `{e}` an expert. A row stands for the module; its last segment (`weight`, `bias`, ...) is carried
over. `rope` marks projections (and the norms on them) whose rows follow the RoPE layout. `stacked` means that the
scheme keeps all experts of hf in one tensor, expert first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple


class Row(NamedTuple):
    own: str
    hf: str
    rope: bool = False
    stacked: bool = False


class Link(NamedTuple):
    """One name of a scheme and its hf name. `expert`: the slice of a stacked tensor that it is."""

    own: str
    hf: str
    rope: bool = False
    expert: int | None = None


@cache
def _pattern(text: str, leaf: bool) -> re.Pattern[str]:
    body = re.escape(text).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(body + (r"\.(?P<leaf>[A-Za-z_0-9]+)" if leaf else "") + r"\Z")


def _fill(text: str, found: dict[str, str], leaf: bool) -> str:
    made = text.replace("{n}", found.get("n", "")).replace("{e}", found.get("e", ""))
    return f"{made}.{found['leaf']}" if leaf else made


def from_own(name: str, rows: Sequence[Row], experts: int = 0) -> list[Link] | None:
    """The hf names of one own name: one, or `experts` of them for a stacked tensor; None where no row fits."""
    for row in rows:
        match = _pattern(row.own, not row.stacked).match(name)
        if match:
            found = match.groupdict()
            if not row.stacked:
                return [Link(name, _fill(row.hf, found, True), row.rope)]
            return [
                Link(name, _fill(row.hf, {**found, "e": str(e), "leaf": "weight"}, True), row.rope, e)
                for e in range(experts)
            ]
    return None


def from_hf(name: str, rows: Sequence[Row]) -> Link | None:
    """The own name of one hf name; None where no row fits."""
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
    return any(_pattern(row.own, not row.stacked).match(name) for row in rows)
