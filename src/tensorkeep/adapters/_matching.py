"""Find the base's weight that each part of an adapter changes, and how its rows lie there.

Adapters are spoken of by hf names; the base keeps its own (Meta's, torchtitan's), perhaps with rows in the other RoPE
layout or experts stacked. A `Term` says what is added to which rows of which stored tensor. A part without a place in
the base is an error (A01).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.adapters._view import ComputedTensor, checked_dtype
from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import Term
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.encoding import Encoding
from tensorkeep.quantization.stored import QuantizedWeight
from tensorkeep.storage.record import FROM_TORCH, TensorRecord


@dataclass
class WeightedAdapter:
    """One adapter of a merge: what it is multiplied by, its digest, and the path it was named by."""

    adapter: Adapter
    weight: float = 1.0
    digest: str = ""

    @property
    def path(self) -> str:
        """The path that the adapter was named by."""
        return self.adapter.view.path


@dataclass
class MergeBase:
    """The base of a merge by hf name, and the records and computed tensors of the merged view as it is built."""

    view: StateView
    config: Mapping[str, Any] | None
    hf_tensors: dict[str, HfTensor]
    weights: dict[str, QuantizedWeight]
    records: dict[str, TensorRecord]
    dtype: str | None
    through: dict[str, Encoding] = field(default_factory=dict)
    made: dict[str, ComputedTensor] = field(default_factory=dict)
    tied: bool = False


def computed_tensor(state: MergeBase, stored: str, name: str | None = None) -> ComputedTensor:
    """Return the computed tensor over a stored one, made on first use; another `name` makes another one of it."""
    record, weight = state.view[stored], state.weights.get(stored)
    name = name or (weight.stands_for if weight is not None else stored)
    if name in state.made:
        return state.made[name]
    shape = weight.shape if weight is not None and weight.shape is not None else record.shape
    tensor = next((h for h in state.hf_tensors.values() if h.parts[0].name == stored), None)
    stacked = tensor is not None and tensor.parts[0].rows is not None
    width = math.prod(shape[2:] if stacked else shape[1:])
    dtype = checked_dtype(record, state.dtype or _float_dtype(state, record, weight))
    if name != stored and weight is not None:
        state.records.pop(stored, None)
    state.records[name] = TensorRecord(
        name, dtype, tuple(shape), record.blocks, record.tied_to if name != hf.HEAD else None
    )
    through = state.through.get(tensor.name) if tensor else None
    made = ComputedTensor(
        stored, math.prod(shape) // max(width, 1), width, [], weight, through, shape[1] if stacked else 1
    )
    state.made[name] = made
    return made


def _float_dtype(state: MergeBase, record: TensorRecord, weight: QuantizedWeight | None) -> str:
    """Return the dtype that a weight had before it was quantized, as its state or the tensors around it say."""
    if weight is None:
        return record.dtype
    if weight.dtype in FROM_TORCH:
        return FROM_TORCH[weight.dtype]
    around = [r.dtype for n, r in state.records.items() if r.dtype in ("F32", "F16", "BF16") and n not in state.weights]
    return max(sorted(set(around)), key=around.count) if around else "BF16"


# -- what an adapter does to which weight --------------------------------------------------------------------------


def terms_of(state: MergeBase, number: int, source: WeightedAdapter) -> dict[str, Term]:
    """Return what an adapter does to each hf tensor that it changes.

    Raises:
        TensorkeepError: A01 where a module has no place in the base.
    """
    adapter = source.adapter
    wanted: dict[str, tuple[str, str]] = dict(adapter.plug.changes(adapter))
    saved = {n: ("saved", n) for n in adapter.saved}
    both = sorted(set(wanted) & set(saved))
    for name in both:  # PEFT keeps the base's own copy of an embedding beside the pair on it
        if state.hf_tensors.get(name) is None or not _same_values(state, name, adapter):
            raise TensorkeepError(
                f"{name} has a low-rank pair and a whole tensor that is not the base's",
                where=source.path,
                code="A01",
                hint="resize the base's vocabulary first, then merge",
            )
        del saved[name]
    wanted |= saved
    missing = sorted(n for n in wanted if n not in state.hf_tensors)
    if missing:
        _refuse_missing(state, source, missing, len(wanted))
    return {name: _term(state, number, source, name, kind, inner) for name, (kind, inner) in wanted.items()}


def _refuse_missing(state: MergeBase, source: WeightedAdapter, missing: list[str], total: int) -> None:
    """Stop: tensors that the adapter changes are not in the base. The hint names the nearest ones that are."""
    close = near_misses(missing[0], state.hf_tensors) or near_misses(
        missing[0].removeprefix("model."), state.hf_tensors
    )
    more = (
        "no adapter weight fits: is it of another model?"
        if len(missing) == total
        else "compare names with: tensorkeep inspect"
    )
    raise TensorkeepError(
        f"{len(missing)} of the {total} tensors it changes are not in the base {state.view.path}: "
        f"{', '.join(grouped(missing)[:4])}",
        where=source.path,
        code="A01",
        tensors=missing,
        hint=close or more,
    )


def _same_values(state: MergeBase, name: str, adapter: Adapter) -> bool:
    """Whether an adapter's saved copy of a base tensor is that tensor; its dtype may be wider."""
    part, stored = state.hf_tensors[name].parts[0], adapter.saved[name]
    if state.hf_tensors[name].shape != adapter.view[stored].shape or part.permutes:
        return False
    mine, theirs = adapter.view.array(stored), state.view.array(part.name)
    return bool((mine.astype(theirs.dtype) == theirs).all())


def _term(state: MergeBase, number: int, source: WeightedAdapter, name: str, kind: str, inner: str) -> Term:
    """Return what one part of an adapter does to a stored tensor: which rows, in which order, by which scale."""
    tensor, adapter = state.hf_tensors[name], source.adapter
    if len(tensor.parts) != 1:
        raise TensorkeepError(
            f"{name} lies in {len(tensor.parts)} tensors of the base",
            where=state.view.path,
            code="A01",
            hint="convert the base to hf first: tensorkeep convert BASE OUT --to hf",
        )
    part = tensor.parts[0]
    weight = state.weights.get(part.name)
    shape = weight.shape if weight is not None and weight.shape is not None else tensor.shape
    transposed = _orientation(state, source, name, kind, inner, shape)
    plug = adapter.plug
    turn = (rope_rows(state.config, "half", name, tensor.shape),) if inner in adapter.turned else ()
    back = tuple(p.inverse() for p in reversed(part.permutes))
    permutes = () if turn and back and turn[0] == back[0].inverse() else (*turn, *back)
    rows = shape[0] if shape else 1
    first = part.rows[0] * rows if part.rows is not None else 0
    scale = plug.scale(adapter, kind, inner) if kind != "saved" and hasattr(plug, "scale") else 1.0
    term = Term(number, adapter, kind, inner, source.weight, scale or 1.0, transposed, permutes, first, rows)
    if kind != "saved" and hasattr(plug, "check"):
        plug.check(term, shape)
    return term


def _orientation(
    state: MergeBase, source: WeightedAdapter, name: str, kind: str, inner: str, shape: tuple[int, ...]
) -> bool:
    """Whether the base keeps the weight transposed, [in, out]; stop (A01) where the shapes do not fit."""
    adapter = source.adapter
    fits = (
        [(adapter.view[adapter.saved[inner]].shape, False)]
        if kind == "saved"
        else adapter.plug.shapes(adapter, kind, inner)
    )
    found = next((turned for made, turned in fits if made == shape), None)
    if found is None:
        made = fits[-1][0]
        hint = "is it an adapter of a larger or smaller model? tensorkeep diagnose ADAPTER --reference BASE lists all"
        if kind == "saved" and shape[1:] == made[1:]:
            hint = "its vocabulary was resized: resize the base's first, then merge"
        raise TensorkeepError(
            f"{name} is {list(shape)} in the base {state.view.path}, the adapter was made for {list(made)}",
            where=source.path,
            code="A01",
            hint=hint,
        )
    return bool(found)
