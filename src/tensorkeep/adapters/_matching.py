"""Find the base's weight that each part of an adapter changes, and how its rows lie there.

Adapters are spoken of by hf names; the base keeps its own (Meta's, torchtitan's), perhaps with rows in the other RoPE
layout or experts stacked. A `Term` says what is added to which rows of which stored tensor. A part without a place in
the base is an error (A01).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorkeep.adapters._joined import Joined
from tensorkeep.adapters._places import Place, ask_names, places
from tensorkeep.adapters._view import ComputedTensor, checked_dtype
from tensorkeep.adapters.reading import Adapter
from tensorkeep.adapters.terms import Term, check_tokens
from tensorkeep.conversion import architecture
from tensorkeep.conversion.model_names import AskNames, ModelNames, unknown
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.naming.rope import rope_rows
from tensorkeep.conversion.plan import HfTensor, Part
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import Note, StateView
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
    coded: set[str] = field(default_factory=set)  # stored names of weights that were codes when the adapter was trained
    joined: dict[str, list[Joined]] = field(default_factory=dict)  # hf name -> matrices in memory that it is a piece of
    made: dict[str, ComputedTensor] = field(default_factory=dict)
    tied: bool = False
    ask: AskNames = unknown
    asked: bool = False
    names: ModelNames | None = None  # once it was asked
    embedding: str = hf.EMBEDDING  # hf name of the input embedding
    head: str = hf.HEAD
    of_input: bool = True  # whether `embedding` is what the model reads tokens with: to no other does PEFT tie
    known: bool = True  # whether something says what is tied to the embedding
    notes: list[Note] = field(default_factory=list)


def computed_tensor(
    state: MergeBase, stored: str, name: str | None = None, terms: Sequence[Term] = ()
) -> ComputedTensor:
    """Return the computed tensor over a stored one, made on first use; another `name` makes another one of it.

    Args:
        state: the base.
        stored: the stored tensor.
        name: the computed one's name; None for the stored one's, or that of what its codes stand for.
        terms: what changes it, which are added to the tensor: a stack of experts is taken by rows, and a whole tensor
            with more or fewer rows brings its own number.
    """
    record, weight = state.view[stored], state.weights.get(stored)
    name = name or (weight.stands_for if weight is not None else stored)
    if name in state.made:
        state.made[name].terms.extend(terms)
        return state.made[name]
    shape = weight.shape if weight is not None and weight.shape is not None else record.shape
    tensor = next((h for h in state.hf_tensors.values() if h.parts[0].name == stored), None)
    stacked = (tensor is not None and tensor.parts[0].rows is not None) or (
        len(shape) == 3
        and (any(t.piece is not None for t in terms) or (tensor is not None and tensor.name in state.joined))
    )
    resized = next((t for t in terms if t.kind == "saved" and t.piece is None and shape and t.length != shape[0]), None)
    held = shape[0] if resized is not None else None
    shape = (resized.length, *shape[1:]) if resized is not None else shape
    width = math.prod(shape[2:] if stacked else shape[1:])
    dtype = checked_dtype(record, state.dtype or _float_dtype(state, record, weight))
    if name != stored and weight is not None:
        state.records.pop(stored, None)
    state.records[name] = TensorRecord(
        name, dtype, tuple(shape), record.blocks, record.tied_to if name != state.head else None
    )
    through = state.through.get(tensor.name) if tensor else None
    joined = state.joined.get(tensor.name, []) if tensor else []
    made = ComputedTensor(
        stored, math.prod(shape) // max(width, 1), width, list(terms), weight, through, shape[1] if stacked else 1, held
    )
    made.joined = joined
    state.made[name] = made
    return made


def _float_dtype(state: MergeBase, record: TensorRecord, weight: QuantizedWeight | None) -> str:
    """Return the dtype that a weight had before it was quantized, as its state or the tensors around it say."""
    computed = getattr(state.view, "made", ())  # floats already, of codes
    if weight is None and record.name not in computed:
        return record.dtype if record.encoding == "plain" else "BF16"
    if weight is not None and weight.dtype in FROM_TORCH:
        return FROM_TORCH[weight.dtype]
    around = [
        r.dtype
        for n, r in state.records.items()
        if r.dtype in ("F32", "F16", "BF16") and n not in state.weights and n not in computed
    ]
    return max(sorted(set(around)), key=around.count) if around else "BF16"


# -- what an adapter does to which weight --------------------------------------------------------------------------


def terms_of(state: MergeBase, number: int, source: WeightedAdapter) -> dict[str, list[Term]]:
    """Return what an adapter does to each hf tensor that it changes: whole tensors first, then single rows, then sums.

    Raises:
        TensorkeepError: A01 where a module has no place in the base.
    """
    adapter = source.adapter
    wanted = [(name, "saved", name) for name in adapter.saved]
    wanted += [(f"{module}.weight", "tokens", module) for module in adapter.tokens]
    wanted += [(name, *what) for name, what in adapter.plug.changes(adapter).items()]
    found = [(name, kind, inner, places(state, source, name, kind)) for name, kind, inner in wanted]
    lacks = getattr(adapter.plug, "MAY_LACK", ())
    missing = sorted({name for name, kind, _, where in found if not where and kind not in lacks})
    if missing:
        _refuse_missing(state, source, missing, len(wanted))
    sums = {p.name for _, kind, _, where in found if kind not in ("saved", "tokens") for p in where}
    out: dict[str, list[Term]] = {}
    for _, kind, inner, where in found:
        for place in where:
            copy = (
                kind == "saved"
                and place.name in sums
                and place.piece is None
                and _same_values(state, place, inner, adapter)
            )
            if not copy:  # PEFT keeps the base's own copy of an embedding beside the pair on it
                out.setdefault(place.name, []).append(_term(state, number, source, place, kind, inner, out))
    return out


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
    if source.adapter.document.get("target_parameters") and state.names is None:
        close = "it targets parameters of the model in memory, found with transformers and the base's config.json"
    raise TensorkeepError(
        f"{len(missing)} of the {total} tensors it changes are not in the base {state.view.path}: "
        f"{', '.join(grouped(missing)[:4])}",
        where=source.path,
        code="A01",
        tensors=missing,
        hint=close or more,
    )


def _same_values(state: MergeBase, place: Place, inner: str, adapter: Adapter) -> bool:
    """Whether an adapter's saved copy of a base tensor is that tensor; its dtype may be wider."""
    part, stored = state.hf_tensors[place.name].parts[0], adapter.saved[inner]
    if state.hf_tensors[place.name].shape != adapter.view[stored].shape or not part.plain:
        return False
    mine, theirs = adapter.view.array(stored), state.view.array(part.name)
    return bool((mine == theirs.astype(mine.dtype)).all())


def _refuse_moved(state: MergeBase, name: str, part: Part, shape: tuple[int, ...]) -> None:
    """Stop at a base that holds a tensor as a piece of another, turned or shifted."""
    cut = part.rows is not None and len(state.view[part.name].shape) == len(shape)
    if part.turned or part.plus or part.inner is not None or cut:
        raise TensorkeepError(
            f"{name} lies in the base as a piece of {part.name}, or turned or shifted",
            where=state.view.path,
            code="A01",
            hint="convert the base to hf first: tensorkeep convert BASE OUT --to hf",
        )


def _term(
    state: MergeBase,
    number: int,
    source: WeightedAdapter,
    place: Place,
    kind: str,
    inner: str,
    earlier: Mapping[str, list[Term]],
) -> Term:
    """Return what one part of an adapter does to a stored tensor: which rows, in which order, by which scale."""
    tensor, adapter, name, piece = state.hf_tensors[place.name], source.adapter, place.name, place.piece
    if len(tensor.parts) != 1:
        raise TensorkeepError(
            f"{name} lies in {len(tensor.parts)} tensors of the base",
            where=state.view.path,
            code="A01",
            hint="convert the base to hf first: tensorkeep convert BASE OUT --to hf",
        )
    part, plug = tensor.parts[0], adapter.plug
    _refuse_moved(state, name, part, tensor.shape)
    weight = state.weights.get(part.name)
    shape = weight.shape if weight is not None and weight.shape is not None else tensor.shape
    replaced = next((t for t in earlier.get(name, ()) if t.kind == "saved"), None)
    if piece is None and replaced is not None and shape:
        shape = (replaced.length, *shape[1:])
    transposed, length = _orientation(state, source, place, kind, inner, place.live if piece is not None else shape)
    turn = (rope_rows(state.config, "half", name, tensor.shape),) if inner in adapter.turned else ()
    back = tuple(p.inverse() for p in reversed(part.permutes))
    permutes = () if turn and back and turn[0] == back[0].inverse() else (*turn, *back)
    if piece is not None and (permutes or kind not in ("pair", "saved") or inner in adapter.magnitudes):
        _refuse_parted(source, place.parameter or inner)
    rows = length if length is not None else shape[0] if shape else 1
    first = part.rows[0] * (tensor.shape[0] if tensor.shape else 1) if part.rows is not None else 0
    if piece is not None:
        rows, first = place.live[-1] if piece.turned else len(piece.rows), first + piece.first
    scale: float | None = 1.0
    if kind not in ("saved", "tokens") and hasattr(plug, "scale"):
        stacked = (place.parameter, place.experts) if place.parameter is not None else None
        scale = plug.scale(adapter, kind, inner, *stacked) if stacked is not None else plug.scale(adapter, kind, inner)
    term = Term(
        number,
        adapter,
        kind,
        inner,
        source.weight,
        scale or 1.0,
        transposed,
        permutes,
        first,
        rows,
        piece,
        place.experts,
    )
    if kind == "tokens":
        check_tokens(term, rows)
    elif kind != "saved" and hasattr(plug, "check"):
        plug.check(term, shape)
    return term


def _refuse_parted(source: WeightedAdapter, name: str) -> None:
    """Stop (A01): a tensor lies in several of the base's, and what the adapter does to it needs it whole."""
    raise TensorkeepError(
        f"{name} lies in several tensors of the base, and the change there is no plain LoRA",
        where=source.path,
        code="A01",
        hint="merge it with the library that trained it: PeftModel.merge_and_unload()",
    )


def _orientation(
    state: MergeBase, source: WeightedAdapter, place: Place, kind: str, inner: str, shape: tuple[int, ...]
) -> tuple[bool, int | None]:
    """Whether the live weight is kept transposed, [in, out], and the number of rows of a whole tensor.

    Raises:
        TensorkeepError: A01 where the shapes do not fit.
    """
    adapter, name = source.adapter, place.name
    if kind == "tokens":
        made = adapter.view[adapter.tokens[inner]].shape
        fits = [(shape if len(made) == 2 and made[1:] == shape[1:] else made, False)]
    elif kind == "saved":
        made = adapter.view[adapter.saved[inner]].shape
        whole = (place.experts, *shape) if place.experts else shape
        if made == whole:
            return False, None if place.piece is not None else made[0] if made else 1
        if (
            made[1:] == shape[1:]
            and name in (state.embedding, state.head, _bias_of(state.head))
            and place.piece is None
        ):
            return False, made[0]
        fits = [(made, False)]
    elif place.experts:
        made = adapter.plug.shapes(adapter, kind, inner)[-1][0]
        fits = [(made[::-1] if place.inward else made, place.inward)]
    else:
        fits = adapter.plug.shapes(adapter, kind, inner)
        lies = _lies(state, adapter, inner)
        if lies is not None and len(fits[-1][0]) == 2 and fits[-1] == (fits[-1][0], False):
            fits = [(fits[-1][0][::-1], True)] if lies == "conv1d" else fits[-1:]
    found = next((turned for made, turned in fits if _fits(made, shape)), None)
    if found is None:
        made = fits[-1][0]
        hint = "is it an adapter of a larger or smaller model? tensorkeep diagnose ADAPTER --reference BASE lists all"
        if name in (state.embedding, state.head) and shape[1:] == made[1:]:
            hint = "its vocabulary was resized and the adapter does not hold the whole tensor: resize the base's first"
        raise TensorkeepError(
            f"{name} is {list(shape)} in the base {state.view.path}, the adapter was made for {list(made)}",
            where=source.path,
            code="A01",
            hint=hint,
        )
    return bool(found), None


def _lies(state: MergeBase, adapter: Adapter, module: str) -> str | None:
    """Return whether a module is "linear" or a "conv1d", whose matrix lies turned; None for others, or where unknown.

    PEFT's config has one word for both (`fan_in_fan_out`): that of the layer that it wrapped last.
    """
    if "fan_in_fan_out" not in adapter.document or (state.config or {}).get("model_type") in architecture.FAMILIES:
        return None
    names = ask_names(state)
    found = names.linear.get(module) if names is not None else None
    return found if found in ("linear", "conv1d") else None


def _fits(made: Sequence[int | None], shape: Sequence[int]) -> bool:
    """Whether a weight has a shape that a kind names; None there is any number."""
    return len(made) == len(shape) and all(m is None or m == s for m, s in zip(made, shape))


def _bias_of(weight: str) -> str:
    """Return the name of the bias beside a weight."""
    return f"{weight.removesuffix('weight')}bias"
