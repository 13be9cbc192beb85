"""Find where the tensors that an adapter speaks of lie in the base's file.

An adapter names modules of the live model. Most names are the file's own; others are found through the model as
transformers builds it: renamed modules, experts stacked in memory and apart in the file, projections joined or parted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tensorkeep.adapters.terms import Lines, Piece
from tensorkeep.conversion.fit import Offer, Shape
from tensorkeep.conversion.model_names import ModelNames
from tensorkeep.conversion.row_maps import Codes, Run, row_count
from tensorkeep.errors import TensorkeepError

if TYPE_CHECKING:
    from tensorkeep.adapters._matching import MergeBase, WeightedAdapter


class Place(NamedTuple):
    """Some rows of one tensor of the base.

    Args:
        name: the tensor's hf name.
        piece: which part of the live tensor they are; None where the two are the same.
        live: the live tensor's shape (of one expert, where it stacks them).
        experts: how many experts the live tensor stacks; 0 for one weight.
        inward: whether these are [in, out].
        parameter: the live name, where the adapter targets a parameter and not a module.
    """

    name: str
    piece: Piece | None
    live: Shape
    experts: int = 0
    inward: bool = False
    parameter: str | None = None


def ask_names(state: MergeBase) -> ModelNames | None:
    """Return what the base's model calls its tensors, asked once; None where nothing can say."""
    if not state.asked:
        state.asked = True
        config = {k: v for k, v in (state.config or {}).items() if k != "quantization_config"}
        wide = {w.stands_for: w for w in state.weights.values()}
        offers = {}
        for name, tensor in state.hf_tensors.items():
            weight = wide.get(tensor.parts[0].name) or state.weights.get(tensor.parts[0].name)
            shape = weight.shape if weight is not None and weight.shape is not None else tensor.shape
            if tensor.tied_to is None or tensor.tied_to not in state.hf_tensors:
                offers[name] = Offer("BF16" if weight is not None else tensor.dtype, tuple(shape))
        state.names = state.ask(config, offers) if config else None
    return state.names


def places(state: MergeBase, source: WeightedAdapter, name: str, kind: str) -> list[Place]:
    """Return the rows of the base that a tensor of the live model is; nothing where the base has none.

    Args:
        state: the base.
        source: the adapter.
        name: the tensor's live name: a module's and `weight`, or a parameter's.
        kind: what the adapter does there, a word of its kind or "saved" or "tokens".

    Raises:
        TensorkeepError: A01 where the base holds it in a way that rows do not describe.
    """
    if name in state.hf_tensors:
        return [Place(name, None, state.hf_tensors[name].shape)]
    names = ask_names(state)
    if names is None:
        return []
    parameter = None
    if name not in names.live and kind == "pair":
        parameter = _targeted(names, source.adapter.document, name.removesuffix(".weight"))
        if parameter is None:
            return []
        name = parameter
    if name in names.odd:
        raise TensorkeepError(
            f"{name} is made of the base's tensors by more than taking rows",
            where=source.path,
            code="A01",
            hint="merge it with the library that trained it: PeftModel.merge_and_unload()",
        )
    return _pieces(state, names, name, parameter)


def _pieces(state: MergeBase, names: ModelNames, name: str, parameter: str | None) -> list[Place]:
    """Return the places of a live tensor."""
    shape, runs = names.live.get(name), names.runs(name)
    if shape is None or any(r.name not in state.hf_tensors for r in runs):
        return []
    stacked = len(shape) == 3
    if runs == (Run(runs[0].name),) and not (stacked and parameter):
        return [Place(runs[0].name, None, shape, 0, False, parameter)]
    pieces = pieces_of(state, names, name)
    inner, experts = (shape[1:], shape[0]) if stacked else (shape, 0)
    return [Place(p.stored, p, inner, experts, name in names.inward, parameter) for p in pieces]


def pieces_of(state: MergeBase, names: ModelNames, name: str) -> list[Piece]:
    """Return the stored rows that make up a live tensor, by hf names; none where the base lacks some.

    Args:
        state: the base.
        names: what its model calls its tensors.
        name: the live tensor.
    """
    shape, runs = names.live[name], names.runs(name)
    if any(r.name not in state.hf_tensors for r in runs):
        return []
    sizes = {r.name: row_count(names.file.get(r.name) or state.hf_tensors[r.name].shape) for r in runs}
    return [p for r, at in _placed(runs, sizes) for p in _cut(r, at, sizes[r.name], shape)]


def _placed(runs: Sequence[Run], sizes: Mapping[str, int]) -> Iterator[tuple[Run, int]]:
    """Yield each run with the first of the live tensor's rows that it makes up."""
    at = 0
    for run in runs:
        yield run, at
        at += run.rows[1] - run.rows[0] if run.rows is not None else sizes[run.name]


def _cut(run: Run, at: int, size: int, shape: Shape) -> Iterator[Piece]:
    """Cut a run where the experts of the live tensor end.

    Args:
        run: rows of a stored tensor.
        at: the first live row that it makes up.
        size: how many rows the stored tensor has.
        shape: the live tensor's.
    """
    stacked = len(shape) == 3
    if run.turned:
        for each in range(shape[0] if stacked else 1):
            yield Piece(run.name, each * shape[-1], each if stacked else None, range(shape[-2]), True)
        return
    unit = 1 if stacked else math.prod(shape[1:-1])  # rows of a convolution are its filters
    first, last = run.rows or (0, size)
    rows = np.arange(at // unit, (at + last - first) // unit)
    if run.permute is not None:
        order = np.asarray(run.permute.order())
        turned = np.empty_like(rows).reshape(-1, len(order))
        turned[:, order] = rows.reshape(turned.shape)
        rows = turned.ravel()
    per = shape[1] if stacked else max(row_count(shape) // unit, 1)
    edges = [0, *(np.flatnonzero(np.diff(rows // per)) + 1).tolist(), len(rows)]
    for low, high in itertools.pairwise(edges):
        expert = int(rows[low]) // per if stacked else None
        yield Piece(run.name, first // unit + low, expert, _lines(rows[low:high] % per))


def _lines(numbers: Codes) -> Lines:
    """Return the numbers of rows as a range where they are one."""
    start, step = int(numbers[0]), int(numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    even = step > 0 and bool((np.diff(numbers) == step).all())
    return range(start, start + step * len(numbers), step) if even else tuple(numbers.tolist())


def _targeted(names: ModelNames, document: Mapping[str, Any], module: str) -> str | None:
    """Return the parameter that PEFT's wrapper in the place of `module` adapts (target_parameters).

    Wrappers of several parameters of one module nest, the first parameter's innermost: one `.base_layer` a level.
    """
    targets = document.get("target_parameters")
    if not isinstance(targets, list):
        return None
    depth = module.count(".base_layer")
    owner = module.replace(".base_layer", "")
    mine = [
        n
        for n in names.live
        if n.rpartition(".")[0] == owner and any(n == t or n.endswith(f".{t}") for t in targets if isinstance(t, str))
    ]
    return mine[len(mine) - 1 - depth] if depth < len(mine) else None


def name_in_file(names: ModelNames, live: str) -> str:
    """Return the hf name of a live tensor that files hold whole, whether this one holds it or not."""
    run = names.runs(live)[0]
    return run.name if names.runs(live) == (Run(run.name),) else live
