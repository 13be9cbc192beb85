"""Bring tensors from a naming to hf and back, as the rows of its tables say: cut, joined, reordered, turned, shifted.

`to_hf` and `to_own` take one tensor and one link; the pieces that they leave are joined by `put_together`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tensorkeep.conversion.naming.rope import rope_rows, section
from tensorkeep.conversion.naming.table import Cut, Link
from tensorkeep.conversion.plan import HfTensor, Part
from tensorkeep.conversion.rows import Run, row_count, taken
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView

Config = Mapping[str, Any]
Shape = tuple[int, ...]


def _number(config: Config, *keys: str) -> int:
    """Return the first of these fields that is a whole number above 0; stop where none is (C03)."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise TensorkeepError(
        f"the config does not say {keys[0]}, which tells how one tensor is cut into several",
        code="C03",
        hint="add the model's folder or config: --config DIR_OR_FILE",
    )


def _attention(config: Config, _rows: int) -> list[int]:
    """Rows of q, k and v: heads times their size."""
    heads = _number(config, "num_attention_heads")
    size = config.get("head_dim") or _number(config, "hidden_size") // heads
    kv = config.get("num_key_value_heads") or heads
    return [heads * size, kv * size, kv * size]


def _delta_net(config: Config, _rows: int) -> list[int]:
    """Rows of q, k and v of a gated delta net: key heads twice, value heads once."""
    keys = _number(config, "linear_num_key_heads") * _number(config, "linear_key_head_dim")
    return [keys, keys, _number(config, "linear_num_value_heads") * _number(config, "linear_value_head_dim")]


# (the config's section, rows in all) -> rows of each piece
SIZES: dict[str, Callable[[Config, int], list[int]]] = {
    "halves": lambda _config, rows: [rows // 2] * 2,
    "thirds": lambda _config, rows: [rows // 3] * 3,
    "attention": _attention,
    "delta net": _delta_net,
}


PIECES = {"halves": 2, "thirds": 3, "attention": 3, "delta net": 3}


def _square_patch(config: Config) -> Shape:
    patch = _number(config, "patch_size")
    return (int(config.get("in_channels") or config.get("num_channels") or 3), patch, patch)


def _video_patch(config: Config) -> Shape:
    channels, *patch = _square_patch(config)
    return (channels, _number(config, "temporal_patch_size"), *patch)


# what hf has in the place of one dimension, by the config's section
SHAPES: dict[str, Callable[[Config], Shape]] = {"patch": _square_patch, "video patch": _video_patch}


class Piece(NamedTuple):
    """A tensor that is one of several of which another is made.

    Args:
        name: what they make.
        cut: which piece it is.
        tensor: the piece.
    """

    name: str
    cut: Cut
    tensor: HfTensor


def to_hf(link: Link, tensor: HfTensor, config: Config | None, sources: Sequence[StateView]) -> HfTensor | Piece:
    """Return what a link makes of a stored tensor.

    Args:
        link: from `table.from_own`.
        tensor: the stored tensor, under its own name.
        config: the model's config; None where no file has one.
        sources: the views that its parts are read from.

    Returns:
        The hf tensor, or a piece of it.

    Raises:
        TensorkeepError: the config that a reordering or a cut needs is missing (C03) or another model's (C01).
    """
    row, name = link.row, tensor.name
    if link.expert is not None:
        tensor = _expert(tensor, link.expert)
    if row.joined is not None:
        tensor = _cut(tensor, row.joined, section(config, row.scope), sources)
    if link.rope:
        tensor = _reordered(tensor, "half", name, config, row.scope)
    tensor = _changed(tensor, row.turned, -row.plus)
    if row.flat:
        shape = (tensor.shape[0], *SHAPES[row.flat](section(config, row.scope)))
        tensor = _reshaped(tensor, shape)
    tensor = replace(tensor, name=link.hf)
    return tensor if row.piece is None else Piece(link.hf, row.piece, tensor)


def to_own(link: Link, tensor: HfTensor, config: Config | None, sources: Sequence[StateView]) -> HfTensor | Piece:
    """Return what a link makes of an hf tensor; arguments and errors as of `to_hf`.

    Args:
        link: from `table.from_hf`.
        tensor: the hf tensor.
        config: the model's config; None where no file has one.
        sources: the views that its parts are read from.

    Returns:
        The tensor under its own name (one expert of it, where the link says so), or a piece of it.
    """
    row, name = link.row, tensor.name
    if row.piece is not None:
        tensor = _cut(tensor, row.piece, section(config, row.scope), sources)
    if link.rope:
        tensor = _reordered(tensor, "pairs", name, config, row.scope)
    tensor = _changed(tensor, row.turned, row.plus)
    if row.flat:
        tensor = _reshaped(tensor, (tensor.shape[0], math.prod(tensor.shape[1:])))
    tensor = replace(tensor, name=link.own)
    return tensor if row.joined is None else Piece(link.own, row.joined, tensor)


def own_shape(link: Link, shape: Shape, config: Config | None) -> Shape:
    """Return the shape that an hf tensor has under a link's own name; of a piece or an expert its own share.

    Args:
        link: from `table.from_hf`.
        shape: of the hf tensor.
        config: the model's config.
    """
    tensor = HfTensor(link.hf, "F32", shape, ())
    if link.row.piece is not None:
        cut = link.row.piece
        low, high = _edges(tensor, cut, section(config, link.row.scope))[cut.number]
        shape = (*shape[: cut.axis], high - low, *shape[cut.axis + 1 :])
    if link.row.turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return (shape[0], math.prod(shape[1:])) if link.row.flat else shape


def put_together(pieces: Mapping[str, Sequence[Piece]], sources: Sequence[StateView]) -> dict[str, HfTensor]:
    """Join the pieces of several tensors, by the tensors' names.

    Args:
        pieces: of each tensor, hf's or the naming's own.
        sources: the views that their parts are read from.

    Returns:
        The tensors, by name.

    Raises:
        TensorkeepError: K01 where a piece is missing, S01 where pieces do not fit each other.
    """
    return {name: _joined(name, found, sources) for name, found in pieces.items()}


# -- steps -----------------------------------------------------------------------------------------------------------


def _expert(tensor: HfTensor, expert: int) -> HfTensor:
    """Return one expert of a stored stack."""
    part = tensor.parts[0]._replace(rows=(expert, expert + 1))
    return replace(tensor, shape=tensor.shape[1:], parts=(part,), actions=(*tensor.actions, "split"), tied_to=None)


def _joined(name: str, pieces: Sequence[Piece], sources: Sequence[StateView]) -> HfTensor:
    """Join the pieces of one tensor."""
    members = [p.tensor for p in sorted(pieces, key=lambda p: p.cut.number)]
    axis = pieces[0].cut.axis
    count = PIECES[pieces[0].cut.rule]
    if len(members) != count:
        raise TensorkeepError(
            f"{name} is made of {count} tensors, and {len(members)} are there",
            code="K01",
            hint="the source is incomplete",
        )
    first = members[0]
    rest = [(m.dtype, len(m.shape), m.shape[:axis], m.shape[axis + 1 :]) for m in members]
    if any(r != rest[0] for r in rest) or len(first.shape) <= axis:
        raise TensorkeepError(f"{name}: the tensors that make it differ in shape or dtype", code="S01")
    shape = (*first.shape[:axis], sum(m.shape[axis] for m in members), *first.shape[axis + 1 :])
    parts: list[Part] = []
    for outer in range(first.shape[0] if axis else 1):
        for member in members:
            rows = row_count(member.shape) // (first.shape[0] if axis else 1)
            span = (outer * rows, (outer + 1) * rows)
            parts += taken(Run(member.name, span), member, sources) if axis else member.parts
    actions = dict.fromkeys(a for m in members for a in m.actions)
    whole = _rejoined(parts, sources)
    done = {**actions, "fuse": None} if len(whole) > 1 else {a: None for a in actions if a != "split"}
    return HfTensor(name, first.dtype, shape, whole, tuple(done))


def _edges(tensor: HfTensor, cut: Cut, config: Config) -> list[tuple[int, int]]:
    """Return where each piece of a tensor begins and ends."""
    rows = tensor.shape[cut.axis] if len(tensor.shape) > cut.axis else 0
    sizes = SIZES[cut.rule](config, rows)
    if sum(sizes) != rows:
        raise TensorkeepError(
            f"{tensor.name}: {rows} rows are not {' and '.join(map(str, sizes))}",
            code="C01",
            hint="is this the config of another model?",
        )
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return list(zip([0, *ends], ends))


def _cut(tensor: HfTensor, cut: Cut, config: Config, sources: Sequence[StateView]) -> HfTensor:
    """Return one piece of a tensor."""
    low, high = _edges(tensor, cut, config)[cut.number]
    rows = tensor.shape[cut.axis]
    outer = math.prod(tensor.shape[: cut.axis])
    unit = row_count(tensor.shape) // max(rows * outer, 1)  # rows in one index of the dimension that is cut
    parts = [
        part
        for n in range(outer)
        for part in taken(Run(tensor.name, ((n * rows + low) * unit, (n * rows + high) * unit)), tensor, sources)
    ]
    shape = (*tensor.shape[: cut.axis], high - low, *tensor.shape[cut.axis + 1 :])
    actions = (*tensor.actions, "split")
    return replace(tensor, shape=shape, parts=_rejoined(parts, sources), actions=actions, tied_to=None)


def _reordered(tensor: HfTensor, layout: str, name: str, config: Config | None, scope: str) -> HfTensor:
    """Return a tensor with its rows in another RoPE layout."""
    rows = rope_rows(section(config, scope) if config else None, layout, name, tensor.shape)
    return replace(tensor, parts=tuple(p.permuted(rows) for p in tensor.parts), actions=(*tensor.actions, "permute"))


def _changed(tensor: HfTensor, turned: bool, plus: int) -> HfTensor:
    """Return a tensor turned and shifted, where it is."""
    if turned:
        shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        parts = tuple(p._replace(turned=not p.turned) for p in tensor.parts)
        tensor = replace(tensor, shape=shape, parts=parts, actions=(*tensor.actions, "turn"))
    if plus:
        parts = tuple(p._replace(plus=p.plus + plus) for p in tensor.parts)
        tensor = replace(tensor, parts=parts, actions=(*tensor.actions, "add"))
    return tensor


def _reshaped(tensor: HfTensor, shape: Shape) -> HfTensor:
    """Return a tensor whose bytes are taken for another shape."""
    if math.prod(shape) != math.prod(tensor.shape):
        raise TensorkeepError(
            f"{tensor.name} is {list(tensor.shape)}, by the config it would be {list(shape)}",
            code="C01",
            hint="is this the config of another model?",
        )
    return replace(tensor, shape=shape)


def _rejoined(parts: Sequence[Part], sources: Sequence[StateView]) -> tuple[Part, ...]:
    """Return the parts with neighbours in one tensor as one part again."""
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if last is not None and (last.source, last.name) == (part.source, part.name) and last.plain and part.plain:
            shape = sources[part.source][part.name].shape
            if (both := _neighbours(last, part, shape)) is not None:
                out[-1] = both
                continue
        out.append(part)
    return tuple(out)


def _neighbours(first: Part, second: Part, shape: Shape) -> Part | None:
    """Return two parts that follow each other as one; None where they do not."""
    if first.rows is None or second.rows is None:
        return None
    if first.inner and second.inner and first.rows == second.rows and first.inner[1] == second.inner[0]:
        inner = (first.inner[0], second.inner[1])
        whole = inner == (0, shape[1])
        return _without_all(first._replace(inner=None if whole else inner), shape)
    if first.inner is None and second.inner is None and first.rows[1] == second.rows[0]:
        return _without_all(first._replace(rows=(first.rows[0], second.rows[1])), shape)
    return None


def _without_all(part: Part, shape: Shape) -> Part:
    """Return a part that is all of its tensor as that."""
    return part._replace(rows=None) if part.inner is None and part.rows == (0, shape[0]) else part
