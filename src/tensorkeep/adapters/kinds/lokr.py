"""LoKr: the Kronecker product of two matrices, each perhaps a low-rank one (PEFT's `LOKR`), on linears.

W + s · (W1 ⊗ W2),  s = alpha / r
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term, alpha_over_rank, permuted, refuse_parts
from tensorkeep.quantization.codes import Array

NAMES = ("LoKr",)
FIELDS = COMMON_FIELDS | {
    "alpha",
    "alpha_pattern",
    "rank_pattern",
    "r",
    "rank_dropout",
    "module_dropout",
    "rank_dropout_scale",
    "decompose_both",
    "decompose_factor",
}
_PART = re.compile(r"(?P<module>.+)\.lokr_(?P<part>w1|w1_a|w1_b|w2|w2_a|w2_b|t2)(\.default)?\Z")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put one of the matrices into the adapter."""
    match = _PART.match(clean)
    if match:
        adapter.parts.setdefault(match["module"], {})[match["part"]] = stored
    return match is not None


def spoken(adapter: Adapter) -> str:
    """Return its name with the rank."""
    return f"LoKr r {adapter.document.get('r')}"


def reason(adapter: Adapter) -> tuple[str, str | None] | None:
    """Return why it cannot be added: convolutions' Tucker form is not read here."""
    conv = next((m for m, parts in adapter.parts.items() if "t2" in parts), None)
    return (f"is a LoKr adapter in Tucker form ({conv})", None) if conv else None


def _shape(adapter: Adapter, module: str, which: str) -> tuple[int, ...] | None:
    """Return the shape of W1 or W2; None where parts are missing or do not meet."""
    parts, view = adapter.parts[module], adapter.view
    halves = [view[parts[p]].shape for p in (f"{which}_a", f"{which}_b") if p in parts]
    if which in parts:
        shape = view[parts[which]].shape
        return shape if len(shape) == 2 and not halves else None
    if len(halves) != 2 or any(len(s) != 2 for s in halves) or halves[0][1] != halves[1][0]:
        return None
    return halves[0][0], halves[1][1]


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where a matrix is missing or ranks do not meet."""
    for module, parts in adapter.parts.items():
        sound = _shape(adapter, module, "w1") is not None and _shape(adapter, module, "w2") is not None
        ranks = {adapter.view[parts[p]].shape[1] for p in ("w1_a", "w2_a") if p in parts} if sound else set()
        refuse_parts(adapter, module, parts, sound and len(ranks) < 2, next(iter(ranks), None))


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that it changes."""
    return {f"{module}.weight": ("lokr", module) for module in adapter.parts}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return the one shape that fits."""
    first, second = (_shape(adapter, module, w) or (0, 0) for w in ("w1", "w2"))
    return [((first[0] * second[0], first[1] * second[1]), False)]


def scale(adapter: Adapter, word: str, module: str) -> float | None:
    """Return alpha / r."""
    return alpha_over_rank(adapter, module)


class Product(NamedTuple):
    """W1 times the scale, W2, and which row of their product each row of the base's file is."""

    first: Array
    second: Array
    order: Array


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Product:
    """Read the two matrices."""
    parts, view = term.adapter.parts[term.name], term.adapter.view

    def matrix(which: str) -> Array:
        """W1 or W2, multiplied out."""
        if which in parts:
            return np.asarray(view.array(parts[which]).astype(np.float64))
        a, b = (view.array(parts[f"{which}_{half}"]).astype(np.float64) for half in "ab")
        return np.asarray(a @ b)

    return Product(matrix("w1") * term.scale, matrix("w2"), permuted(np.arange(term.length), term.permutes))


def change(term: Term, loaded: Product, weights: Array, rows: slice) -> Array:
    """Return some rows of the product."""
    here, height = loaded.order[rows], len(loaded.second)
    made = loaded.first[here // height][:, :, None] * loaded.second[here % height][:, None, :]
    return np.asarray(made.reshape(len(here), -1))


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return f"LoKr, scale {term.scale:.6g}"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "LoKr"


def fixed(term: Term) -> bool:
    """Return that the update does not depend on the weight."""
    return True
