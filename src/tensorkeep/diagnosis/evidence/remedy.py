"""What is to be done to mend a checkpoint: the remedies that checks hand to `repair`.

A recipe gives a tensor in hf layout and the checkpoint's dtype when it is asked for; nothing is computed before. What
a cause destroyed is `lost`: only the reference can hold it, and repair takes it from there where it is asked to by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.findings import counted

Recipe = Callable[[], Array]


class Piece(NamedTuple):
    """Where a missing tensor is: in another tensor of the checkpoint, whole or some of its rows."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass
class Remedies:
    """What is to be done: recipes by name, names to leave out, names lost, files to take from the reference.

    `origins` says where a missing tensor was found under another name, `elements` which tensors take single elements
    from the reference, and `inverted` of which an arithmetic was undone; recipes of all others only move values.
    """

    recipes: dict[str, Recipe] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)  # hf name -> code
    origins: dict[str, Piece] = field(default_factory=dict)  # hf name of a missing tensor -> where it is
    elements: dict[str, str] = field(default_factory=dict)  # hf name -> code
    inverted: set[str] = field(default_factory=set)
    companions: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # code -> what it needs
    done: dict[str, str] = field(default_factory=dict)  # code -> what was done

    def lose(self, names: Iterable[str], code: str) -> None:
        """Note tensors that cannot be had back, and the code that tells of them."""
        self.lost.update(dict.fromkeys(names, code))


def heal(case: Case, names: list[str], out: Remedies, code: str) -> None:
    """Take the damaged elements of these tensors from the reference."""
    for name in names:
        out.recipes[name] = lambda name=name: _healed(case, name, code)  # type: ignore[misc]
        out.elements[name] = code
    out.done[code] = f"took the damaged elements of {counted(len(names), 'tensor')} from the reference"


def _healed(case: Case, name: str, code: str) -> Array:
    """Return a tensor with its damaged elements from the reference: what is not finite (V01), or all that differ."""
    mine = case.values(name).copy()
    theirs = case.reference_values(name).astype(mine.dtype)
    flat, wanted = mine.reshape(-1), theirs.reshape(-1)
    if code == "V01":
        wrong = ~np.isfinite(flat.astype(np.float32)) & np.isfinite(wanted.astype(np.float32))
    else:
        word = f"u{mine.itemsize}"
        wrong = flat.view(word) != np.ascontiguousarray(wanted).view(word)
    flat[wrong] = wanted[wrong]
    return mine
