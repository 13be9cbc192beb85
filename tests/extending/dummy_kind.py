"""`STRETCH`: a vector for each adapted linear, by which the rows of its weight grow: W + v · W, one v a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import Term, whole
from tensorkeep.quantization.codes import Array

NAMES = ("Stretch",)
FIELDS = frozenset({"peft_type", "target_modules", "task_type"})
_VECTOR = re.compile(r"(?P<module>.+)\.stretch_vector\Z")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put a vector into the adapter."""
    match = _VECTOR.match(clean)
    if match:
        adapter.parts[match["module"]] = {"vector": stored}
    return match is not None


def spoken(adapter: Adapter) -> str:
    """Return its name and how many linears it stretches."""
    return f"Stretch of {len(adapter.parts)}"


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that are stretched."""
    return {f"{module}.weight": ("stretch", module) for module in adapter.parts}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int, ...], bool]]:
    """Return the one shape that fits: a square, to keep the dummy small."""
    count = adapter.view[adapter.parts[module]["vector"]].shape[0]
    return [((count, count), False)]


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Array:
    """Read the vector as a column."""
    return whole(term, term.adapter.parts[term.name]["vector"])


def change(term: Term, loaded: Array, weights: Array, rows: slice) -> Array:
    """Return by how much some rows grow."""
    return np.asarray(loaded[rows] * weights)


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return "stretched"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "Stretch"
