"""What adapters do to the tensors of a base, one term an adapter and tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.quantization.codes import Array

if TYPE_CHECKING:
    from tensorkeep.adapters.reading import Adapter


class Term(NamedTuple):
    """What one adapter does to some rows of one stored tensor of the base.

    Args:
        number: which adapter, by its place in the merge.
        adapter: the adapter.
        kind: how, in a word of the adapter's kind: LoRA's "pair", "embedding", "bias"; or "saved" (it is replaced).
        name: the adapter's module, or a whole tensor's clean name.
        weight: what the whole adapter is multiplied by.
        scale: what B A is multiplied by: alpha / r.
        transposed: whether the base keeps [in, out].
        permutes: bring the adapter's rows into the order of the base's file.
        first, length: its rows of the stored tensor, in a stack of experts.
    """

    number: int
    adapter: Adapter
    kind: str
    name: str
    weight: float
    scale: float
    transposed: bool = False
    permutes: tuple[RowPermutation, ...] = ()
    first: int = 0
    length: int = 0

    @property
    def magnitude(self) -> str | None:
        """The stored name of DoRA's magnitudes; None without DoRA."""
        return self.adapter.magnitudes.get(self.name) if self.kind in ("pair", "embedding") else None


def permuted(values: Array, permutes: tuple[RowPermutation, ...]) -> Array:
    """Reorder the rows of whole heads into another RoPE layout."""
    for rows in permutes:
        heads = values.reshape(-1, rows.block, *values.shape[1:])
        values = heads[:, rows.order()].reshape(values.shape)
    return values


def whole(term: Term, stored: str) -> Array:
    """Read a stored tensor as [rows, the rest] in float64, its rows in the order of the base's file."""
    values = term.adapter.view.array(stored)
    return permuted(values.astype(np.float64).reshape(values.shape[0] if values.ndim else 1, -1), term.permutes)
