"""Ask transformers how a config's model lies in memory: on the meta device, with the library's own conversions.

Where a file's tensors go is read off from numbers: each live tensor is filled with the numbers of its rows and
columns, the library turns it into what it would save, and the numbers say which rows and columns each file holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion.fit import Offer
from tensorkeep.conversion.live import Lines, Live, Piece, Shape
from tensorkeep.models.loader import meta_model
from tensorkeep.models.refusals import refusals

_MOST = 1 << 28  # elements of a live tensor that are numbered in full; of a larger one, some columns
_COLUMNS = 8


def live_by_transformers(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> Live | None:
    """Let transformers build the model for tensors of these names and shapes, and return how it lies in memory.

    Args:
        config: as config.json has it.
        offers: the tensors by hf name.

    Returns:
        Names, pieces and ties; None where transformers is not installed or has no such model.
    """
    found = meta_model(config, offers)
    if found is None:
        return None
    model = found[0]
    try:
        return _described(model)
    except refusals():
        return None


def _described(model: Any) -> Live:
    """Return names, ties and pieces of a model on the meta device."""
    tensors = dict(model.state_dict(keep_vars=True))
    ties = {str(k): str(v) for k, v in (getattr(model, "all_tied_weights_keys", None) or {}).items()}
    own = {id(p): n for n, p in model.named_parameters()}
    embedding, head = (_name(own, tensors, m) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if embedding == head and embedding is not None:  # one parameter: the head's own name is another of its names
        others = [n for n, t in tensors.items() if t is tensors[embedding] and n != embedding]
        head = next(iter(others), None)
    out = Live({n: tuple(p.shape) for n, p in tensors.items()}, {}, set(), embedding, head, False, ties)
    out.tied = head is not None and (ties.get(head) == embedding or tensors.get(head) is tensors.get(embedding or ""))
    out.shapes = {n: out.shapes[n] for n in [*(n for n, _ in model.named_parameters() if n in out.shapes), *out.shapes]}
    for name, module in model.named_modules():
        if getattr(module, "is_transposed", False) is True:
            out.inward |= {f"{name}.{n}" for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    for group in _groups(model, tensors):
        _locate(model, {n: out.shapes[n] for n in group}, out)
    return out


def _name(own: Mapping[int, str], tensors: Mapping[str, Tensor], module: nn.Module | None) -> str | None:
    """Return the live name of a module's weight; None where it has none."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    return own.get(id(weight)) or next((n for n, t in tensors.items() if t is weight), None)


def _revert(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what transformers 5 would save for these live tensors; the same where it renames and rearranges none."""
    theirs = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    made: dict[str, Tensor] = theirs(model, dict(state)) if theirs is not None else state
    return made


def _groups(model: Any, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield live names whose tensors files hold by another name or in another way; those that share files together."""
    plain = {n: torch.empty(t.shape, dtype=torch.int8, device="meta") for n, t in tensors.items()}
    shared: dict[str, list[str]] = {}
    for name, tensor in plain.items():
        made = _revert(model, {name: tensor})
        if made.keys() != {name} or made[name] is not tensor:
            shared.setdefault(next(iter(made), name), []).append(name)
    yield from shared.values()


def _locate(model: Any, shapes: Mapping[str, Shape], out: Live) -> None:
    """Find the pieces of some live tensors in files; what is no matter of rows and columns is odd."""
    hollow = {n: torch.empty(s, dtype=torch.int8, device="meta") for n, s in shapes.items()}
    made = _revert(model, hollow)
    if len(shapes) == len(made) == 1 and next(iter(made.values())) is next(iter(hollow.values())):
        ((name, shape),), (stored,) = shapes.items(), made
        width = torch.Size(shape[1:]).numel()
        out.pieces[name] = [Piece(stored, 0, None, range(shape[0] if shape else 1), range(width))]
        return
    rows, columns = _numbers(shapes)
    lines, across = _revert(model, rows), _revert(model, columns)
    names = list(shapes)
    full = {n: s[-1] if len(s) > 1 else 1 for n, s in shapes.items()}
    found: dict[str, list[Piece]] = {n: [] for n in names}
    for stored, numbers in lines.items():
        for piece in _pieces(stored, numbers, across[stored]):
            if piece is None:
                out.odd |= set(names)
                return
            number, rest = piece
            columns_of = rest.columns
            if isinstance(columns_of, range) and rows[names[number]].shape[-1] == _COLUMNS != full[names[number]]:
                columns_of = range(full[names[number]]) if columns_of == range(_COLUMNS) else ()
            if not len(columns_of):
                out.odd |= set(names)
                return
            found[names[number]].append(rest._replace(columns=columns_of))
    out.pieces |= found


_ROWS, _EXPERTS = 1 << 24, 1 << 16


def _numbers(shapes: Mapping[str, Shape]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, for each live tensor, one that holds its row's number (with expert and tensor) and one its column's."""
    rows, columns = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        if len(shape) > 1 and torch.Size(shape).numel() > _MOST:
            shape = (*shape[:-1], min(_COLUMNS, shape[-1]))
        flat = torch.arange(shape[1] if len(shape) == 3 else shape[0]) + number * _EXPERTS * _ROWS
        if len(shape) == 3:
            lead = flat[None, :, None] + torch.arange(1, shape[0] + 1)[:, None, None] * _ROWS
            across = torch.arange(shape[2])[None, None, :]
        elif len(shape) > 1:
            lead = flat.reshape(-1, *[1] * (len(shape) - 1))
            across = torch.arange(torch.Size(shape[1:]).numel()).reshape(1, *shape[1:])
        else:
            lead, across = flat, torch.zeros(1, dtype=torch.long)
        rows[name], columns[name] = lead.expand(shape).contiguous(), across.expand(shape).contiguous()
    return rows, columns


def _pieces(stored: str, rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Piece] | None]:
    """Yield the pieces of one stored tensor, each with the number of the live tensor it is of; None for an odd one."""
    slices = list(zip(rows, columns)) if rows.dim() == 3 and bool((rows >> 24 & 0xFFFF).any()) else [(rows, columns)]
    for at, (lead, across) in enumerate(slices):
        lead, across = lead.reshape(len(lead), -1), across.reshape(len(across), -1)
        turned = lead.shape[1] > 1 and not bool((lead == lead[:, :1]).all())
        if turned:
            lead, across = lead.T, across.T
        if not bool((lead == lead[:, :1]).all() and (across == across[:1]).all()):
            yield None
            return
        taken = _lines(across[0])
        first = at * (lead.shape[1] if turned else lead.shape[0])
        whose = lead[:, 0] >> 24
        if turned and len(set(whose.tolist())) > 1:
            yield None
            return
        for code, run in groupby(enumerate(whose.tolist()), key=lambda pair: pair[1]):
            places = [place for place, _ in run]
            mine = _lines(lead[places[0] : places[-1] + 1, 0] & (_ROWS - 1))
            expert = code % _EXPERTS - 1
            yield (
                code // _EXPERTS,
                Piece(
                    stored, first + (0 if turned else places[0]), expert if expert >= 0 else None, mine, taken, turned
                ),
            )


def _lines(numbers: Tensor) -> Lines:
    """Return numbers as a range where they are one."""
    found = [int(n) for n in numbers]
    if len(found) < 2:
        return range(found[0], found[0] + 1)
    step = found[1] - found[0]
    even = range(found[0], found[0] + step * len(found), step) if step > 0 else range(0)
    return even if list(even) == found else tuple(found)
