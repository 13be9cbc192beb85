"""Read what a pickle says of a DTensor: one rank's part of a tensor, and how the whole was cut; nothing is built."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage.archive import Stored, is_count, sizes_of, stored_tensor
from tensorkeep.storage.pickle_values import Global, Object

_MOST_RANKS = 1 << 20


class Part(NamedTuple):
    """One rank's part of a tensor.

    Attributes:
        local: the part as it lies in this rank's file.
        shape: sizes of the whole tensor.
        cuts: for each dimension of the mesh the dimension of the tensor that it cuts; None where it repeats the whole.
        mesh: sizes of the mesh of ranks; empty where the file does not say.
    """

    local: Stored
    shape: tuple[int, ...]
    cuts: tuple[int | None, ...]
    mesh: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether this part is the whole tensor."""
        return self.local.shape == self.shape


def part_of(value: Any, where: object) -> Part | None:
    """Read the DTensor that a pickled object describes.

    Args:
        value: what the pickle holds.
        where: the file, for messages.

    Returns:
        The part; None where the object is no DTensor.

    Raises:
        TensorkeepError: F07 where it contradicts itself, without a code where the whole was cut in a way that is not
            followed here.
    """
    if not isinstance(value, Object) or value.call.name != "_rebuild_from_type_v2" or len(value.args) != 4:
        return None
    _, kind, _, held = value.args
    if not isinstance(kind, Global) or kind.name != "DTensor":
        return None
    state = _merged(held)
    tensor, spec = state.get("_local_tensor"), _attributes(state.get("_spec"))
    local = stored_tensor(tensor, where) if isinstance(tensor, Object) else None
    about = spec.get("tensor_meta")
    fields = about.args if isinstance(about, Object) else ()  # a namedtuple: sizes, strides, dtype
    shape = sizes_of(fields[0] if fields else _attributes(about).get("shape"))
    placements = spec.get("placements")
    if local is None or shape is None or not isinstance(placements, tuple) or len(shape) != len(local.shape):
        raise TensorkeepError("damaged DTensor", where=where, code="F07", hint="copy the file again")
    cuts = tuple(_cut(p, len(shape), where) for p in placements)
    return Part(local, shape, cuts, _mesh(_attributes(spec.get("mesh")), where))


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of a pickled object, or the fields of one with slots."""
    return _merged(value.state if isinstance(value, Object) else None)


def _merged(state: Any) -> dict[str, Any]:
    if isinstance(state, tuple):
        return {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
    return state if isinstance(state, dict) else {}


def _cut(placement: Any, dimensions: int, where: object) -> int | None:
    name = placement.call.name if isinstance(placement, Object) else ""
    if name == "Replicate":
        return None
    state = _attributes(placement)
    found = state.get("dim", placement.args[0] if isinstance(placement, Object) and placement.args else None)
    if name == "Shard" and is_count(found) and found < dimensions:
        return found
    raise TensorkeepError(
        f"a DTensor of placement {shown(name)}: it is not joined here",
        where=where,
        hint="save it with torch.distributed.checkpoint, or join it with the program that wrote it (verl: "
        "python -m verl.model_merger merge)",
    )


def _mesh(state: dict[str, Any], where: object) -> tuple[int, ...]:
    """Return the sizes of the mesh, as the torch that wrote it spells them."""
    layout = _attributes(state.get("_layout"))
    axes = layout.get("axes")
    if isinstance(axes, tuple):
        sizes: Any = [n for axis in axes for n in _flat(_attributes(axis).get("shape"))]
    elif "shape" in layout:
        sizes = _flat(layout["shape"])
    else:
        mesh = state.get("mesh")
        found = stored_tensor(mesh, where) if isinstance(mesh, Object) else None
        sizes = found.shape if found is not None else ()
    return tuple(sizes) if all(is_count(n) for n in sizes) and math.prod(sizes) <= _MOST_RANKS else ()


def _flat(value: Any) -> list[Any]:
    return [n for part in value for n in _flat(part)] if isinstance(value, tuple) and len(value) < 32 else [value]


def place(part: Part, rank: int, where: object) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return which rectangle of the whole tensor a rank's part is, as torch cuts it.

    Args:
        part: what the rank's file says.
        rank: the rank's number.
        where: the file, for messages.

    Returns:
        Offsets and sizes; None where a rank before it holds the same.

    Raises:
        TensorkeepError: F07 where the part has other sizes.
    """
    mesh = part.mesh
    if len(mesh) != len(part.cuts) or rank >= math.prod(mesh):
        raise TensorkeepError("a DTensor without its mesh", where=where, code="F07", hint="copy the file again")
    at = []
    for size in reversed(mesh):
        rank, own = divmod(rank, size)
        at.append(own)
    offsets, sizes = [0] * len(part.shape), list(part.shape)
    repeated = False
    for own, count, cut in zip(reversed(at), mesh, part.cuts):
        if cut is None:
            repeated |= own > 0
            continue
        chunk = -(-sizes[cut] // count)
        begun = min(own * chunk, sizes[cut])
        offsets[cut], sizes[cut] = offsets[cut] + begun, min(chunk, sizes[cut] - begun)
    if tuple(sizes) != part.local.shape:
        raise TensorkeepError(
            f"a part of sizes {list(part.local.shape)}, where {sizes} belong",
            where=where,
            code="F07",
            hint="the ranks' files are of different saves; copy the checkpoint again",
        )
    return None if repeated else (tuple(offsets), tuple(sizes))
