"""IA3: a factor for each output of a linear (with its bias), or for each input of a feed-forward one (PEFT's `IA3`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term, permuted, refuse_parts
from tensorkeep.quantization.codes import Array

NAMES = ("IA3",)
FIELDS = COMMON_FIELDS | {"feedforward_modules", "init_ia3_weights"}
MAY_LACK = ("bias",)  # what is changed where the base has it
_PART = re.compile(r"(?P<module>.+)\.ia3_l(\.default)?\Z")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put a vector into the adapter."""
    match = _PART.match(clean)
    if match:
        adapter.parts[match["module"]] = {"factors": stored}
    return match is not None


def spoken(adapter: Adapter) -> str:
    """Return its name."""
    return "IA3"


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where a vector is none."""
    for module, parts in adapter.parts.items():
        shape = adapter.view[parts["factors"]].shape
        refuse_parts(adapter, module, parts, len(shape) == 2 and 1 in shape, None)


def _by_input(adapter: Adapter, module: str) -> bool:
    """Whether the factors are the inputs': PEFT stores those as a row, the outputs' as a column."""
    return adapter.view[adapter.parts[module]["factors"]].shape[0] == 1


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that it scales, and the biases beside those that are scaled by output."""
    out = {f"{m}.weight": ("columns" if _by_input(adapter, m) else "rows", m) for m in adapter.parts}
    return out | {f"{m}.bias": ("bias", m) for m in adapter.parts if not _by_input(adapter, m)}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return the shapes that fit; one dimension may be anything. [in, out] first where the config says so."""
    count = adapter.view[adapter.parts[module]["factors"]].elements
    if word == "bias":
        return [((count,), False)]
    made: tuple[int | None, ...] = (None, count) if word == "columns" else (count, None)
    return [*([(made[::-1], True)] if adapter.document.get("fan_in_fan_out") else []), (made, False)]


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Array:
    """Read the factors less one, as a column for rows of the file and as a row for its columns."""
    factors = term.adapter.view.array(term.adapter.parts[term.name]["factors"]).astype(np.float64).reshape(-1, 1) - 1
    by_row = term.kind == "bias" or (term.kind == "rows") != term.transposed
    return permuted(factors, term.permutes) if by_row else factors.T


def change(term: Term, loaded: Array, weights: Array, rows: slice) -> Array:
    """Return by how much some rows grow."""
    return np.asarray(weights * (loaded[rows] if loaded.shape[1] == 1 and len(loaded) == term.length else loaded))


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return f"IA3, {term.kind} scaled"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "IA3"
