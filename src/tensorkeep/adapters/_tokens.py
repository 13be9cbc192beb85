"""Single rows of an embedding that an adapter replaces: PEFT's `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tensorkeep.adapters.terms import Term, permuted
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.quantization.codes import Array


def indices(document: Mapping[str, Any], module: str) -> list[int] | None:
    """Return which rows of a module's weight an adapter replaces, as its config says.

    Args:
        document: the adapter's config.
        module: the module's name.

    Returns:
        The rows in the order of the stored values; None where the config says none, or nonsense.
    """
    said = document.get("trainable_token_indices", document.get("token_indices"))
    if isinstance(said, Mapping):
        said = next((v for k, v in said.items() if module == k or module.endswith(f".{k}")), None)
    if not isinstance(said, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in said):
        return None
    return said


def check_tokens(term: Term, rows: int) -> None:
    """Stop (A02) where the config does not say which rows the stored ones are.

    Args:
        term: what the adapter does.
        rows: of the weight.

    Raises:
        TensorkeepError: A02.
    """
    view = term.adapter.view
    shape, found = view[term.adapter.tokens[term.name]].shape, indices(term.adapter.document, term.name)
    wrong = None
    if found is None:
        wrong = f"holds {shape[0]} rows of {term.name}, and its config does not say which"
    elif len(found) != shape[0] or len(set(found)) != len(found):
        wrong = (
            f"holds {shape[0]} rows of {term.name}, and its config lists {len(found)}, {len(set(found))} of them apart"
        )
    elif any(not 0 <= i < rows for i in found):
        wrong = f"replaces row {shown(next(i for i in found if not 0 <= i < rows))} of {term.name}, which has {rows}"
    if wrong is not None:
        raise TensorkeepError(
            wrong, where=view.path, code="A02", hint="take the config that was saved with these weights"
        )


def load_tokens(term: Term) -> tuple[Array, Array]:
    """Return the rows that are replaced, in the order of the base's file, and their values in float64."""
    places = np.arange(term.length)
    for rows in reversed(term.permutes):
        places = permuted(places, (rows,))
    order = np.argsort(places)  # the place in the file of each row
    found = indices(term.adapter.document, term.name)
    values = term.adapter.view.array(term.adapter.tokens[term.name]).astype(np.float64)
    return order[np.asarray(found, dtype=np.int64)], values
