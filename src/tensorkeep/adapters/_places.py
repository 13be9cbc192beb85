"""Find where the tensors that an adapter speaks of lie in the base's file.

An adapter names modules of the live model. Most names are the file's own; others are found through the model as
transformers builds it: renamed modules, experts stacked in memory and apart in the file, projections joined or parted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.live import Live, Piece, Shape
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


def ask_live(state: MergeBase) -> Live | None:
    """Return how the base's model lies in memory, asked once; None where nothing can say."""
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
        state.live = state.ask(config, offers) if config else None
    return state.live


def places(state: MergeBase, source: WeightedAdapter, name: str, kind: str) -> list[Place]:
    """Return the rows of the base that a tensor of the live model is; nothing where the base has none.

    Args:
        state: the base.
        source: the adapter.
        name: the tensor's live name: a module's and `weight`, or a parameter's.
        kind: what the adapter does there, a word of its kind or "saved" or "tokens".

    Raises:
        TensorkeepError: A01 where the base holds it in a way that rows and columns do not describe.
    """
    if name in state.hf_tensors:
        return [Place(name, None, state.hf_tensors[name].shape)]
    live = ask_live(state)
    if live is None:
        return []
    parameter = None
    if name not in live.shapes and kind == "pair":
        parameter = _targeted(live, source.adapter.document, name.removesuffix(".weight"))
        if parameter is None:
            return []
        name = parameter
    if name in live.odd:
        raise TensorkeepError(
            f"{name} is made of the base's tensors by more than taking rows and columns",
            where=source.path,
            code="A01",
            hint="merge it with the library that trained it: PeftModel.merge_and_unload()",
        )
    return _pieces(state, live, name, parameter)


def _pieces(state: MergeBase, live: Live, name: str, parameter: str | None) -> list[Place]:
    """Return the places of a live tensor."""
    shape = live.shapes.get(name)
    if shape is None:
        return []
    inward = name in live.inward
    if name not in live.pieces:
        if name not in state.hf_tensors:
            return []
        return (
            _stack(name, shape, inward, parameter)
            if len(shape) == 3 and parameter
            else [_whole(name, shape, parameter)]
        )
    pieces = live.pieces[name]
    if any(p.stored not in state.hf_tensors for p in pieces):
        return []
    first = state.hf_tensors[pieces[0].stored]
    if len(pieces) == 1 and first.shape == shape and pieces[0].expert is None and not pieces[0].turned:
        if len(shape) == 3 and parameter:
            return _stack(first.name, shape, inward, parameter)
        if pieces[0].rows == range(shape[0] if shape else 1):
            return [_whole(first.name, shape, parameter)]
    experts = shape[0] if len(shape) == 3 else 0
    return [Place(p.stored, p, shape[1:] if experts else shape, experts, inward, parameter) for p in pieces]


def _whole(name: str, shape: Shape, parameter: str | None) -> Place:
    """Return the place of a tensor that is in the file as it is in memory."""
    return Place(name, None, shape, 0, False, parameter)


def _stack(name: str, shape: Shape, inward: bool, parameter: str | None) -> list[Place]:
    """Return the places of a stack of experts that the file holds as it is in memory."""
    count, rows, columns = shape
    return [
        Place(name, Piece(name, e * rows, e, range(rows), range(columns)), shape[1:], count, inward, parameter)
        for e in range(count)
    ]


def _targeted(live: Live, document: Mapping[str, Any], module: str) -> str | None:
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
        for n in live.shapes
        if n.rpartition(".")[0] == owner and any(n == t or n.endswith(f".{t}") for t in targets if isinstance(t, str))
    ]
    return mine[len(mine) - 1 - depth] if depth < len(mine) else None


def names_in_file(state: MergeBase, live: Live, names: Iterable[str]) -> list[str]:
    """Return the hf names of live tensors that the file would hold whole, whether it holds them or not."""
    return [live.pieces[n][0].stored if len(live.pieces.get(n, ())) == 1 else n for n in names]
