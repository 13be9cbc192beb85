"""What adapters do to the tensors of a base, one term an adapter and tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.quantization.codes import Array

if TYPE_CHECKING:
    from tensorkeep.adapters.reading import Adapter


Lines = range | tuple[int, ...]  # which rows, in order


class Piece(NamedTuple):
    """Some rows of a stored tensor, as rows of a tensor in memory.

    Args:
        stored: the tensor's hf name.
        first: the first of these rows; a stored stack of experts counts the rows of all of them.
        expert: which slice of a stack of experts in memory; None where that tensor is none.
        rows: the rows in memory, of the slice where there is one.
        turned: whether these are the stored columns.
    """

    stored: str
    first: int
    expert: int | None
    rows: Lines
    turned: bool = False


class Term(NamedTuple):
    """What one adapter does to some rows of one stored tensor of the base.

    Args:
        number: which adapter, by its place in the merge.
        adapter: the adapter.
        kind: how, in a word of the adapter's kind: LoRA's "pair", "embedding", "bias"; or, of any adapter, "saved"
            (it is replaced) and "tokens" (some rows are).
        name: the adapter's module, or a whole tensor's clean name.
        weight: what the whole adapter is multiplied by.
        scale: what B A is multiplied by: alpha / r.
        transposed: whether the base, as it lies in memory, keeps [in, out].
        permutes: bring the adapter's rows into the order of the base's file.
        first, length: its rows of the stored tensor, in a stack of experts.
        piece: which part of the tensor in memory these rows are; None where they are all of it.
        experts: how many experts the adapter's tensors hold side by side; 0 for one weight.
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
    piece: Piece | None = None
    experts: int = 0

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
    if term.piece is not None and term.piece.expert is not None:
        values = values[term.piece.expert]
    values = values.astype(np.float64).reshape(values.shape[0] if values.ndim else 1, -1)
    return permuted(within(term.piece, values), term.permutes)


def within(piece: Piece | None, values: Array) -> Array:
    """Return the part of a matrix, as it lies in memory, that some stored rows are; all of it without a piece."""
    if piece is None:
        return values
    made = values[taken(piece.rows)]
    return made.T if piece.turned else made


def taken(lines: Lines) -> slice | list[int]:
    """Return rows as numpy takes them."""
    return slice(lines.start, lines.stop, lines.step) if isinstance(lines, range) else list(lines)


# -- single rows of an embedding (PEFT's `trainable_token_indices`) ----------------------------------------------------


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


# -- what kinds share -------------------------------------------------------------------------------------------------

# fields of PEFT's configs that say where an adapter sits, and change nothing about what it does there
COMMON_FIELDS = frozenset(
    """
    auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out inference_mode init_weights layers_pattern
    layers_to_transform modules_to_save peft_type peft_version revision runtime_config target_modules task_type
    """.split()
)


def alpha_over_rank(adapter: Adapter, module: str) -> float | None:
    """Return alpha / r as LyCORIS' kinds have it; None for nonsense.

    Args:
        adapter: the adapter.
        module: the module's hf name.
    """
    alpha: Any = adapter.of_pattern("alpha_pattern", module) or adapter.document.get("alpha")
    rank = adapter.said_rank(module)
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < abs(n) < 1e9 for n in (alpha, rank)):
        return None
    return float(alpha / rank)


def refuse_parts(adapter: Adapter, module: str, parts: Mapping[str, str], sound: bool, rank: int | None) -> None:
    """Stop where the parts of one module are no adapter, or have another rank than its config says.

    Args:
        adapter: the adapter.
        module: the module's hf name.
        parts: its tensors' stored names by part.
        sound: whether all are there and their shapes meet.
        rank: of the tensors; None where they have none.

    Raises:
        TensorkeepError: A02.
    """
    wrong = None
    if not sound:
        shapes = ", ".join(f"{p} {list(adapter.view[n].shape)}" for p, n in sorted(parts.items()))
        wrong, hint = f"{module}: {shapes} are not one adapter's", "get the adapter again: it was saved in part"
    elif rank is not None and adapter.said_rank(module) != rank:
        wrong = f"{module} has rank {rank}, the config says {shown(adapter.said_rank(module))}"
        hint = "take the config that was saved with these weights: the scale depends on it"
    elif hasattr(adapter.plug, "scale") and not adapter.plug.scale(adapter, "", module):
        wrong = f"{module} is scaled by nothing: alpha {shown(adapter.document.get('alpha'))}"
        hint = "take the config that was saved with these weights"
    if wrong is not None:
        raise TensorkeepError(wrong, where=adapter.view.path, code="A02", tensors=sorted(parts.values()), hint=hint)


# -- tensors that are tied ---------------------------------------------------------------------------------------------

TIED = "ensure_weight_tying"
_PEFT_TIES = frozenset({"embed_tokens", "lm_head"})  # its EMBEDDING_LAYER_NAMES


def kept_tied(term: Term, other: bool) -> bool:
    """Whether PEFT keeps a tie through a change of one of the tensors.

    Rows of the input embedding are put into all that is tied to it. What is asked to be tied is, where the module has
    one of the two names that PEFT knows (0.21): GPT-2's `wte` and T5's `shared` have not, and are trained alone.

    Args:
        term: the change.
        other: whether it is of a tensor that is tied to the embedding, and not of the embedding.
    """
    if term.kind == "tokens":
        return not other
    return term.adapter.document.get(TIED) is True and not _PEFT_TIES.isdisjoint(term.name.split("."))


def same_terms(terms: Sequence[Term], others: Sequence[Term]) -> bool:
    """Whether two tensors are changed by the very same.

    Args:
        terms: of one.
        others: of the other.
    """
    return [id(t) for t in terms] == [id(t) for t in others]
