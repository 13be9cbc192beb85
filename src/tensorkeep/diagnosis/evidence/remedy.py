"""What is to be done to mend a checkpoint: the remedies that checks hand to `repair`.

A recipe gives a tensor in hf layout and the checkpoint's dtype when it is asked for; nothing is computed before. What
a cause destroyed is `lost`: only the reference can hold it, and whether it may be taken from there is repair's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case

Recipe = Callable[[], Array]


@dataclass
class Remedies:
    """What is to be done: recipes by name, names to leave out, names lost, files to take from the reference."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)  # hf name -> code
    companions: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # code -> what it needs
    done: dict[str, str] = field(default_factory=dict)  # code -> what was done

    def lose(self, names: Iterable[str], code: str) -> None:
        """Note tensors that cannot be had back, and the code that tells of them."""
        self.lost.update(dict.fromkeys(names, code))


def heal(case: Case, names: list[str], out: Remedies, code: str) -> None:
    """Take the damaged elements of these tensors from the reference."""
    for name in names:
        out.recipes[name] = lambda name=name: _healed(case, name)  # type: ignore[misc]
    out.done[code] = f"took the damaged elements of {len(names)} tensors from the reference"


def _healed(case: Case, name: str) -> Array:
    """Return a tensor with its damaged elements (not finite, or differing among equal ones) from the reference."""
    mine = case.values(name).copy()
    theirs = case.reference_values(name).astype(mine.dtype)
    word = f"u{mine.itemsize}"
    differs = mine.reshape(-1).view(word) != np.ascontiguousarray(theirs).reshape(-1).view(word)
    flat = mine.reshape(-1)
    if differs.mean() < 0.5:
        flat[differs] = theirs.reshape(-1)[differs]
    else:
        wrong = ~np.isfinite(flat.astype(np.float32))
        flat[wrong] = theirs.reshape(-1)[wrong]
    return mine
