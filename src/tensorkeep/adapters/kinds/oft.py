"""OFT: the inputs of a linear are turned, block by block, by orthogonal matrices (PEFT's `OFT`).

W R^T,  R by block: (I - Q)(I + Q)^-1 of a skew-symmetric Q, or the first terms of its Neumann series
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term, refuse_parts
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import Array

NAMES = ("OFT",)
FIELDS = COMMON_FIELDS | {
    "r",
    "oft_block_size",
    "module_dropout",
    "bias",
    "eps",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
}
_MOST_TERMS = 64
_PART = re.compile(r"(?P<module>.+)\.oft_R(\.default)?(\.weight)?\Z")


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Put the angles of a linear into the adapter."""
    match = _PART.match(clean)
    if match:
        adapter.parts[match["module"]] = {"angles": stored}
    return match is not None


def spoken(adapter: Adapter) -> str:
    """Return its name with the block size."""
    return f"OFT, blocks of {adapter.document.get('oft_block_size')}"


def reason(adapter: Adapter) -> tuple[str, str | None] | None:
    """Return why it cannot be merged here: what PEFT does not store, or changes once more on the way."""
    if adapter.document.get("coft"):
        return "is a constrained OFT adapter (coft), which PEFT projects anew when it merges", None
    if adapter.document.get("use_cayley_neumann") is None:
        return "is an OFT adapter of an older PEFT, which does not say how its matrices are made", None
    terms = adapter.document.get("num_cayley_neumann_terms", 5)
    if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= _MOST_TERMS:
        return "is an OFT adapter whose series has no sensible number of terms (num_cayley_neumann_terms)", None
    return None


def _block(elements: int) -> int | None:
    """Return the size of a block that has so many angles: elements = size · (size - 1) / 2."""
    size = round((1 + (1 + 8 * elements) ** 0.5) / 2)
    return size if size * (size - 1) // 2 == elements else None


def refuse(adapter: Adapter) -> None:
    """Stop (A02) where the angles are no square blocks'."""
    for module, parts in adapter.parts.items():
        shape = adapter.view[parts["angles"]].shape
        refuse_parts(adapter, module, parts, len(shape) == 2 and _block(shape[1]) is not None, None)


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return the weights that it turns."""
    return {f"{module}.weight": ("turn", module) for module in adapter.parts}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return the shape that fits: any number of rows, and a column for each row of the blocks."""
    count, elements = adapter.view[adapter.parts[module]["angles"]].shape
    width = None if adapter.document.get("block_share") else count * (_block(elements) or 0)
    return [((None, width), False)]


def check(term: Term, shape: tuple[int, ...]) -> None:
    """Stop (A02) where the blocks do not fill a row of the weight."""
    count, elements = term.adapter.view[term.adapter.parts[term.name]["angles"]].shape
    size = _block(elements) or 1
    if shape[1] % size or (count not in (1, shape[1] // size)):
        raise TensorkeepError(
            f"{term.name}: blocks of {size} for rows of {shape[1]}",
            where=term.adapter.view.path,
            code="A02",
            hint="take the config that was saved with these weights",
        )


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> Array:
    """Make the blocks of R, [blocks, size, size]."""
    given, view = term.adapter.document, term.adapter.view
    angles = view.array(term.adapter.parts[term.name]["angles"]).astype(np.float64)
    size = _block(angles.shape[1]) or 1
    skew = np.zeros((len(angles), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = angles
    skew -= skew.transpose(0, 2, 1)
    one = np.eye(size)
    if not given.get("use_cayley_neumann"):
        return np.linalg.solve((one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1)).transpose(0, 2, 1)
    made, power, terms = np.repeat(one[None], len(angles), 0), skew, int(given.get("num_cayley_neumann_terms", 5))
    terms = 4 if terms == 3 else terms  # as PEFT counts them: both end with the third power
    for number in range(1, terms):  # I + 2Q + 2Q^2 + ..., the last of them once
        last = number == terms - 1 and terms > 2
        made = made + (power if last else 2 * power)
        power = power @ skew
    return made


def change(term: Term, loaded: Array, weights: Array, rows: slice) -> Array:
    """Return some rows turned, less the rows themselves."""
    size = loaded.shape[1]
    parts = weights.reshape(len(weights), -1, size)
    blocks = np.broadcast_to(loaded, (parts.shape[1], size, size)) if len(loaded) == 1 else loaded
    return np.asarray(np.einsum("nbk,bck->nbc", parts, blocks).reshape(weights.shape) - weights)


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return "OFT"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "OFT"
