"""LoHa: the product, value by value, of two low-rank matrices (PEFT's `LOHA`), on linears.

W + s · (A1 B1) * (A2 B2),  s = alpha / r
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term, alpha_over_rank, refuse_parts, whole
from tensorkeep.quantization.codes import Array

NAMES = ("LoHa",)
FIELDS = COMMON_FIELDS | {"alpha", "alpha_pattern", "rank_pattern", "r", "rank_dropout", "module_dropout"}
_PART = re.compile(r"(?P<module>.+)\.hada_(?P<part>w1_a|w1_b|w2_a|w2_b|t1|t2)(\.default)?\Z")
_NEEDED = ("w1_a", "w1_b", "w2_a", "w2_b")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put one of the matrices into the adapter."""
    match = _PART.match(clean)
    if match:
        adapter.parts.setdefault(match["module"], {})[match["part"]] = stored
    return match is not None


def spoken(adapter: Adapter) -> str:
    """Return its name with the rank."""
    return f"LoHa r {adapter.document.get('r')}"


def reason(adapter: Adapter) -> tuple[str, str | None] | None:
    """Return why it cannot be added: convolutions' Tucker form is not read here."""
    conv = next((m for m, parts in adapter.parts.items() if "t1" in parts), None)
    return (f"is a LoHa adapter in Tucker form ({conv})", None) if conv else None


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where a matrix is missing or ranks do not meet."""
    for module, parts in adapter.parts.items():
        shapes = {p: adapter.view[n].shape for p, n in parts.items()}
        sound = set(shapes) == set(_NEEDED) and all(len(s) == 2 for s in shapes.values())
        met = sound and all(shapes[f"w{i}_a"][1] == shapes[f"w{i}_b"][0] for i in (1, 2))
        same = met and [shapes[f"w1_{x}"][x == "b"] for x in "ab"] == [shapes[f"w2_{x}"][x == "b"] for x in "ab"]
        refuse_parts(adapter, module, parts, bool(same), shapes["w1_a"][1] if same else 0)


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that it changes."""
    return {f"{module}.weight": ("loha", module) for module in adapter.parts}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return the one shape that fits."""
    parts = adapter.parts[module]
    return [((adapter.view[parts["w1_a"]].shape[0], adapter.view[parts["w1_b"]].shape[1]), False)]


def scale(adapter: Adapter, word: str, module: str) -> float | None:
    """Return alpha / r."""
    return alpha_over_rank(adapter, module)


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> list[Array]:
    """Read the four matrices; those with rows of the weight in the order of the base's file."""
    parts, view = term.adapter.parts[term.name], term.adapter.view
    a1, a2 = (whole(term, parts[p]) for p in ("w1_a", "w2_a"))
    b1, b2 = (view.array(parts[p]).astype(np.float64) for p in ("w1_b", "w2_b"))
    return [a1 * term.scale, b1, a2, b2]


def change(term: Term, loaded: list[Array], weights: Array, rows: slice) -> Array:
    """Return the product for some rows."""
    a1, b1, a2, b2 = loaded
    return np.asarray((a1[rows] @ b1) * (a2[rows] @ b2))


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return f"LoHa, scale {term.scale:.6g}"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "LoHa"


def fixed(term: Term) -> bool:
    """Return that the update does not depend on the weight."""
    return True
