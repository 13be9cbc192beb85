"""VeRA: two matrices shared by all linears, and two vectors for each (PEFT's `VERA`).

W + diag(b) B diag(d) A,  rows of B and columns of A as far as the linear goes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term, permuted, refuse_parts
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import Array

NAMES = ("VeRA",)
FIELDS = COMMON_FIELDS | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias"}
_PART = re.compile(r"(?P<module>.+)\.vera_lambda_(?P<part>[bd])(\.default)?\Z")
_SHARED = re.compile(r"(base_model\.)?vera_(?P<part>[AB])(\.default)?\Z")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put a vector, or one of the shared matrices (under no module), into the adapter."""
    if match := _SHARED.match(clean):
        adapter.parts.setdefault("", {})[match["part"]] = stored
    elif match := _PART.match(clean):
        adapter.parts.setdefault(match["module"], {})[match["part"]] = stored
    else:
        return False
    return True


def spoken(adapter: Adapter) -> str:
    """Return its name with the rank."""
    return f"VeRA r {adapter.document.get('r')}"


def reason(adapter: Adapter) -> tuple[str, str | None] | None:
    """Return why it cannot be merged: without the matrices, only PEFT's random numbers have them."""
    if set(adapter.parts.get("", {})) != {"A", "B"}:
        return "is a VeRA adapter saved without its projections (save_projection: false)", None
    return None


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where vectors and matrices do not meet."""
    a, b = (adapter.view[adapter.parts[""][p]].shape for p in "AB")
    for module, parts in adapter.parts.items():
        if module:
            shapes = {p: adapter.view[n].shape for p, n in parts.items()}
            sound = len(a) == len(b) == 2 and a[0] == b[1] and set(shapes) == {"b", "d"}
            met = sound and shapes["d"] == (a[0],) and len(shapes["b"]) == 1 and shapes["b"][0] <= b[0]
            refuse_parts(adapter, module, parts, met, a[0] if met else None)


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that it changes."""
    return {f"{module}.weight": ("vera", module) for module in adapter.parts if module}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return the shapes that fit: any number of inputs. [in, out] first where the config says so."""
    made = (adapter.view[adapter.parts[module]["b"]].shape[0], None)
    return [*([(made[::-1], True)] if adapter.document.get("fan_in_fan_out") else []), (made, False)]


def check(term: Term, shape: tuple[int, ...]) -> None:
    """Stop (A02) where the shared matrices are too small for a weight."""
    width = term.adapter.view[term.adapter.parts[""]["A"]].shape[1]
    if (shape[0] if term.transposed else shape[1]) > width:
        raise TensorkeepError(
            f"{term.name}: {list(shape)} has more inputs than vera_A's {width}",
            where=term.adapter.view.path,
            code="A02",
            hint="is it an adapter of a smaller model?",
        )


class Factors(NamedTuple):
    """diag(b) B as [rows, r] and diag(d) A as [r, columns], as the base's file has rows and columns."""

    left: Array
    right: Array


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Factors:
    """Read the vectors and the shared matrices."""
    view, parts = term.adapter.view, term.adapter.parts
    a, b = (view.array(parts[""][p]).astype(np.float64) for p in "AB")
    rows, inner = (view.array(parts[term.name][p]).astype(np.float64)[:, None] for p in "bd")
    outer, inward = permuted(rows * b[: len(rows)], term.permutes), inner * a
    return Factors(inward.T, outer.T) if term.transposed else Factors(outer, inward)


def change(term: Term, loaded: Factors, weights: Array, rows: slice) -> Array:
    """Return the product for some rows."""
    return np.asarray(loaded.left[rows] @ loaded.right[:, : weights.shape[1]])


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return "VeRA"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "VeRA"


def fixed(term: Term) -> bool:
    """Return that the update does not depend on the weight."""
    return True
