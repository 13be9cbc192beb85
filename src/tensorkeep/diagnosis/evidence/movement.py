"""Describe how values moved away from the reference: few or all, by one simple operation, or as training does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.originals import relation_of
from tensorkeep.diagnosis.evidence.statistics import Relation, pieces_of, rounded, rows_of, sampled, spread
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.storage.record import DTYPES

_TRAINED_SHARE = 0.5  # part of the floating tensors that must have moved for the move to be training's
KEPT = 0.5  # r that training keeps with where it started; noise as large as the weights has 0.7


@dataclass(frozen=True)
class Changed:
    """The elements of a tensor that differ from the reference's.

    `count` of `of` elements differ; `first` and `last` are the places of two of them in flat order. `bits` holds, for
    the first 64, how many bits of the element changed.
    """

    count: int
    of: int
    first: int
    last: int
    bits: tuple[int, ...]

    @property
    def share(self) -> float:
        """The part of the elements that differ."""
        return self.count / max(self.of, 1)


def bit_patterns(a: Array) -> Array:
    """Return the bits of each element as an unsigned integer, flat."""
    return np.ascontiguousarray(a).reshape(-1).view(f"u{a.itemsize}")


def changed_elements(case: Case, name: str) -> Changed:
    """Find the elements of a tensor whose bits differ from the reference's, once for all checks."""
    kept: dict[str, Changed] = case.results.setdefault("touches", {})
    if name not in kept:
        mine, theirs = case.pair(name)
        a, b = bit_patterns(mine), bit_patterns(theirs)
        count = sum(int(np.count_nonzero(x != y)) for x, y in zip(pieces_of(a), pieces_of(b)))
        if count > 0.5 * a.size:  # no check asks where the elements of such a tensor lie
            kept[name] = Changed(count, a.size, 0, a.size - 1, ())
            return kept[name]
        at = np.flatnonzero(a != b)
        few = at[:64]
        bits = tuple(int(x).bit_count() for x in a[few] ^ b[few])
        ends = (int(at[0]), int(at[-1])) if at.size else (0, 0)
        kept[name] = Changed(int(at.size), mine.size, *ends, bits)
    return kept[name]


def trained_further(case: Case) -> bool:
    """Say whether the checkpoint is the reference trained further: most floating tensors moved and still resemble it.

    Decided once for all checks, by the tensors that no check has explained by then.
    """
    known: bool | None = case.results.get("trained")
    if known is None:
        floating = [n for n in case.shared() if n in case.comparisons and DTYPES[case.tensors[n].dtype].floating]
        moved = [n for n in floating if case.changed(n) and n not in case.claims]
        known = len(moved) >= _TRAINED_SHARE * max(len(floating), 1) and len(moved) >= 4
        case.results["trained"] = known = known and _resemble(case, moved)
    return known


def _resemble(case: Case, names: Sequence[str]) -> bool:
    """Say whether a sample of these tensors still correlates with the reference, by the median."""
    some = [n for n in names if case.tensors[n].shape][:: max(len(names) // 16, 1)]
    return bool(some) and float(np.median([relation_of(case, n).correlation for n in some])) > KEPT


@dataclass(frozen=True)
class Fit:
    """The simplest operation that makes the reference into the tensor.

    `kind` is scale, offset, row scale, column scale, noise, low rank, drift or unrelated; `number` the factor or the
    offset; `relation` how the two relate as they are.
    """

    kind: str
    number: float | None
    relation: Relation

    @property
    def simple(self) -> bool:
        """Whether factors or an offset explain every value."""
        return self.kind in ("scale", "offset", "row scale", "column scale")

    def to_json(self) -> dict[str, Any]:
        """Return the fit as evidence of a finding."""
        return {
            "fit": self.kind,
            **({"by": rounded(self.number)} if self.number is not None else {}),
            **self.relation.to_json(),
        }


def fit(case: Case, name: str, closely: bool = True) -> Fit:
    """Find the operation that fits a tensor which differs from its reference.

    Args:
        case: The case, with a reference.
        name: The tensor.
        closely: Also try factors a row or column, low rank and noise; otherwise one factor or one offset only.
    """
    mine, theirs = case.pair(name)
    found = relation_of(case, name)
    if found.unrelated and mine.size >= 64:
        return Fit("unrelated", None, found)
    step = _rounding(case, name)
    x, y = (sampled(v).astype(np.float64) for v in (mine, theirs))
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(keep, x, 0), np.where(keep, y, 0)
    delta = x - y
    # an operation is simple when it explains every element up to two roundings, and is itself larger than a rounding
    if abs(found.scale - 1) > step and (np.abs(x - found.scale * y) <= 1.5 * step * np.abs(x) + 1e-30).all():
        return Fit("scale", found.scale, found)
    by = float(delta.mean())
    if (
        abs(by) > 4 * float(delta.std())
        and (np.abs(delta - by) <= 1.5 * step * (np.abs(x) + np.abs(y) + abs(by))).all()
    ):
        return Fit("offset", by, found)
    if not closely:
        return Fit("drift", None, found)
    if mine.ndim > 1:
        for kind, axis in (("row scale", 1), ("column scale", 0)):
            left = _scaled_lines(x, y, axis)
            if left < 2 * step < 0.5 * found.residual:
                return Fit(kind, None, found)
        if _low_rank(mine, theirs):
            return Fit("low rank", None, found)
    moved = spread(delta) if mine.ndim > 1 else None
    return Fit("noise" if moved is not None and moved.fresh else "drift", None, found)


def _rounding(case: Case, name: str) -> float:
    """Return how much of a value one rounding to the narrower dtype may change (in fp32: some arithmetic as well)."""
    dtype = case.narrower(name, name)
    return {"F64": 2.0**-40, "F32": 2.0**-20, "F16": 2.0**-11, "BF16": 2.0**-8}.get(dtype, 2.0**-4)


def _scaled_lines(x: Array, y: Array, axis: int) -> float:
    """Return what remains of x, relative to x, when each row or column of y gets its own factor."""
    dot, norm = (x * y).sum(axis=axis, keepdims=True), (y * y).sum(axis=axis, keepdims=True)
    factor = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)
    whole = float((x * x).sum())
    return math.sqrt(float(np.square(x - factor * y).sum()) / whole) if whole > 0 else 0.0


def _low_rank(mine: Array, theirs: Array, most: int = 256) -> bool:
    """Say whether the difference has a rank far below its size, as a merged adapter's; on a corner of the matrix."""
    a, b = (rows_of(v)[:most, :most].astype(np.float64) for v in (mine, theirs))
    if min(a.shape) < 32:
        return False
    with np.errstate(invalid="ignore"):
        delta = np.nan_to_num(a - b)
    values = np.linalg.svd(delta, compute_uv=False)
    energy = np.cumsum(values**2)
    return bool(energy[-1] > 0 and energy[max(min(a.shape) // 4 - 1, 0)] > 0.9 * energy[-1])


def structured(case: Case, names: Sequence[str]) -> bool:
    """Say whether these are what partial training moves: tensors of one kind in every layer, or whole last layers."""
    layers: dict[tuple[str, str], set[int]] = {}
    every: dict[str, set[int]] = {}
    for name in case.tensors:
        if (found := layer_of(name)) is not None:
            every.setdefault(found[0], set()).add(found[1])
    for name in names:
        if (found := layer_of(name)) is not None:
            layers.setdefault((found[0], found[2]), set()).add(found[1])
    if not layers:
        return False
    whole = all(got == every[stack] for (stack, _), got in layers.items())
    last = all(got == set(range(min(got), max(every[stack]) + 1)) for (stack, _), got in layers.items())
    sets = {frozenset(got) for got in layers.values()}
    return whole or (last and len(sets) == 1 and len(layers) > 3)
