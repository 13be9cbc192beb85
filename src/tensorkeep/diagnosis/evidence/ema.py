"""Pair the live and the averaged copy of a model in one file, and measure how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorkeep.conversion.naming import EMA_ROOTS
from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.bytewise import aligned, as_float, width
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.formats.names import strip_root, unwrap
from tensorkeep.formats.view import StateView
from tensorkeep.storage.record import DTYPES, TensorRecord

LIVE_ROOTS = ("state_dict", "model", "model_state_dict", "module", "net")


@dataclass(frozen=True)
class Average:
    """An averaged copy (EMA) of a model in a checkpoint.

    Args:
        view: the checkpoint.
        root: prefix of the averaged names.
        pairs: name without roots and wrappers -> stored names (averaged, live).
        alone: stored names of averaged tensors without a live one of their shape.
    """

    view: StateView
    root: str
    pairs: dict[str, tuple[str, str]]
    alone: tuple[str, ...] = ()


def average(case: Case) -> Average | None:
    """Find the averaged copy in the checkpoint (under `state_dict_ema` and the like), once for all checks."""
    if "average" not in case.results:
        case.results["average"] = _average(case.view) if case.view is not None else None
    found: Average | None = case.results["average"]
    return found


def _average(view: StateView) -> Average | None:
    """Pair the averaged copy with the live copy that shares most names with it."""
    copies = {root: found for root in (*sorted(EMA_ROOTS), *LIVE_ROOTS) if (found := _under(view, root))}
    ema = next((r for r in copies if r in EMA_ROOTS), None)
    if ema is None:
        return None
    live = max(
        (r for r in copies if r not in EMA_ROOTS), key=lambda r: len(set(copies[r]) & set(copies[ema])), default=None
    )
    beside = copies[live] if live is not None else {}
    pairs = {
        n: (stored, beside[n])
        for n, stored in copies[ema].items()
        if n in beside and view[stored].shape == view[beside[n]].shape
    }
    return Average(view, ema, pairs, tuple(stored for n, stored in copies[ema].items() if n not in pairs))


def _under(view: StateView, root: str) -> dict[str, str]:
    """Map the names below a root, without it, to stored names. Files of timm and torch nest once more (`module.`)."""
    out = {}
    for name in view:
        rest = strip_root(unwrap(name)[0], root)
        if rest is not None:
            out[unwrap(rest)[0].removeprefix("module.")] = name
    return out


def bare(name: str) -> str:
    """Return a name without the root of a live copy and without wrappers, as `Average.pairs` has it."""
    inner = unwrap(name)[0]
    rest = next((r for root in LIVE_ROOTS if (r := strip_root(inner, root)) is not None), inner)
    return unwrap(rest)[0].removeprefix("module.")


def integer(record: TensorRecord) -> bool:
    """Say whether a tensor holds integers: counters, or packed codes."""
    return not DTYPES[record.dtype].floating


def differences(found: Average) -> dict[str, tuple[float, float]]:
    """Measure how far apart the averaged and the live copy are.

    Args:
        found: The averaged copy.

    Returns:
        For each pair of `found.pairs` (Frobenius norm of averaged - live, norm of live). The first is 0 where every
        value is equal; the second is then 0 too, since it is not computed.

    Raises:
        TensorkeepError: Where a file is damaged.
    """
    return {name: _distance(found.view, *stored) for name, stored in found.pairs.items()}


def distances(case: Case) -> dict[str, tuple[float, float]]:
    """Return `differences` of the checkpoint's averaged copy, computed once for all checks; {} where there is none."""
    if "average differences" not in case.results:
        found = average(case)
        case.results["average differences"] = differences(found) if found is not None else {}
    kept: dict[str, tuple[float, float]] = case.results["average differences"]
    return kept


def floating_distances(case: Case) -> dict[str, tuple[float, float]]:
    """Return `distances` of floating weights alone: no counters, no codes or scales of quantized weights."""
    found = average(case)
    packed = {n for w in quant_evidence.weights(case).values() for n in w.stored}
    return {
        n: m
        for n, m in distances(case).items()
        if found is not None and found.pairs[n][0] not in packed and not integer(found.view[found.pairs[n][0]])
    }


def _distance(view: StateView, one: str, other: str) -> tuple[float, float]:
    """Return the norm of `one` - `other`, and that of `other` where they differ."""
    a, b = view[one], view[other]
    apart = norm = 0.0
    for x, y in aligned(view.stream(one), view.stream(other), width(a.dtype), width(b.dtype)):
        if a.dtype == b.dtype and bytes(x) == bytes(y):
            continue
        if not (DTYPES[a.dtype].numpy and DTYPES[b.dtype].numpy):
            return float("inf"), 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            apart += float(np.nansum(np.square(as_float(x, a.dtype) - as_float(y, b.dtype))))
    if apart:
        for piece in view.stream(other):
            with np.errstate(over="ignore", invalid="ignore"):
                norm += float(np.nansum(np.square(as_float(piece, b.dtype))))
    return float(np.sqrt(apart)), float(np.sqrt(norm))


def entries(view: StateView, *words: str) -> Iterator[tuple[str, Any]]:
    """Yield the plain numbers of a file whose name ends with one of the given words.

    Args:
        view: The file.
        words: Last segments of names, such as "decay" or "step".

    Returns:
        Pairs of the full name and the number.
    """
    for name, value in view.entries.items():
        if name.rpartition(".")[2] in words and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def array(view: StateView, name: str) -> Array:
    """Return a stored tensor as float32."""
    return np.asarray(view.array(name).astype(np.float32))
