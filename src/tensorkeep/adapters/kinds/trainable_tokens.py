"""Trainable tokens: rows of an embedding in the place of the base's (PEFT's `TRAINABLE_TOKENS`), nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import COMMON_FIELDS, Term
from tensorkeep.quantization.codes import Array

NAMES = ("trainable tokens",)
FIELDS = COMMON_FIELDS | {"token_indices"}


def take(adapter: Adapter, stored: str, clean: str) -> bool:
    """Take nothing: rows of embeddings are of no kind, every adapter may have them."""
    return False


def spoken(adapter: Adapter) -> str:
    """Return how many rows it replaces."""
    return f"trainable tokens, {sum(adapter.view[n].shape[0] for n in adapter.tokens.values())} rows"


def changes(adapter: Adapter) -> dict[str, tuple[str, str]]:
    """Return nothing: the rows are all that changes."""
    return {}


def shapes(adapter: Adapter, word: str, module: str) -> list[tuple[tuple[int | None, ...], bool]]:
    """Return no shape: there are no changes."""
    return []


def load(term: Term, base_rows: Callable[[], Iterator[tuple[int, Array]]]) -> None:
    """Read nothing: there are no changes."""


def change(term: Term, loaded: None, weights: Array, rows: slice) -> Array:
    """Return what is not asked for: there are no changes."""
    return 0 * weights


def told(term: Term) -> str:
    """Return the change for a line of the plan."""
    return "rows replaced"


def variant(term: Term) -> str:
    """Return the change for a report."""
    return "rows replaced"
