"""Describe how values moved away from the reference: few or all, by one simple operation, or as training does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorkeep.diagnosis.evidence.bytewise import bits_equal
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.originals import relation_of
from tensorkeep.diagnosis.evidence.statistics import Relation, pieces_of, rounded, rows_of, sampled, spread
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.formats.arrays import np_dtype
from tensorkeep.storage.record import DTYPES

_TRAINED_SHARE = 0.5  # part of the floating tensors without another finding that training must have moved
_EXPLAINED = 0.35  # part of a difference that a factor may leave, to explain it
_BARELY = 0.01  # part of the root mean square of a tensor that is next to nothing
# the distance of a dtype's numbers, relative to them
_EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_LARGEST_GROWTH = 4.0  # times that training changes the size of a matrix at most
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
        mine, theirs = case.own_pair(name)
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


def barely_moved(case: Case, name: str) -> bool:
    """Say whether every element that differs moved by next to nothing: two roundings, or 1 % of the usual size.

    So does training in 16 bits at a small rate: most steps round away, and a few elements go to a neighbouring number.
    """
    kept: dict[str, bool] = case.results.setdefault("barely", {})
    if name not in kept:
        step = 2 * _EPSILON.get(case.narrower(name, name), 2.0**-7)
        kept[name] = True
        mine, theirs = case.own_pair(name)
        square = sum(float(np.square(b.astype(np.float64)).sum()) for b in pieces_of(theirs))
        floor = _BARELY * math.sqrt(square / max(theirs.size, 1))
        for x, y in zip(pieces_of(mine), pieces_of(theirs)):
            a, b = x.astype(np.float64), y.astype(np.float64)
            if not (np.abs(a - b) <= np.maximum(step * np.abs(b), floor)).all():
                kept[name] = False
                break
    return kept[name]


def trained_further(case: Case) -> bool:
    """Say whether the checkpoint is the reference trained further: most floating tensors moved and still resemble it.

    Decided once for all checks, by the tensors that no check has explained by then.
    """
    known: bool | None = case.results.get("trained")
    if known is None:
        left = [n for n in case.shared() if n in case.comparisons and n not in case.claims]
        floating = [n for n in left if DTYPES[case.tensors[n].dtype].floating]
        moved = [n for n in floating if case.changed(n)]
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
    mine, theirs = case.own_pair(name)
    found = relation_of(case, name)
    if found.unrelated and mine.size >= 64:
        return Fit("unrelated", None, found)
    step = _rounding(case, name)
    x, y = (sampled(v).astype(np.float64) for v in (mine, theirs))
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(keep, x, 0), np.where(keep, y, 0)
    delta = x - y
    # an operation is simple when it explains every element up to two roundings, and far more than rounding would
    if (
        abs(found.scale - 1) > step
        and found.residual < _EXPLAINED * found.relative
        and (np.abs(x - found.scale * y) <= 1.5 * step * np.abs(x) + 1e-30).all()
    ):
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
    """Return how much of a value one rounding may change (in fp32: some arithmetic as well).

    It is the narrower dtype's, unless the checkpoint stores a wider one and uses it.
    """
    dtype, own = case.narrower(name, name), case.tensors[name].dtype
    if dtype != own:
        mine, narrow = case.values(name), np_dtype(dtype)
        dtype = dtype if bits_equal(mine, mine.astype(narrow).astype(mine.dtype)) else own
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


def resembles(found: Relation) -> bool:
    """Say whether a tensor is still near enough to its reference to have come from it by training.

    Training adds to weights: it keeps their direction for the most part and does not change their size many times
    over, as codes taken for values do.
    """
    return found.correlation > KEPT and 1 / _LARGEST_GROWTH < abs(found.scale) < _LARGEST_GROWTH


def structured(case: Case, names: Sequence[str]) -> bool:
    """Say whether these are what partial training moves: one kind in every layer, whole last layers, or the ends.

    The ends are what lies outside of the layers: embeddings, the last norm, heads.
    """
    layers = _layers_of(names)
    if not layers:
        return True
    # of a kind of which some tensors have another finding, the others are all that can have moved
    others = [n for n in case.shared() if n in names or n not in case.claims]
    every, stacks = _layers_of(others), _layers_of(case.shared())
    depth = {stack: max(max(got) for (s, _), got in stacks.items() if s == stack) for stack, _ in layers}
    whole = all(got == every[kind] for kind, got in layers.items())
    last = all(got == set(range(min(got), depth[kind[0]] + 1)) for kind, got in layers.items())
    sets = {frozenset(got) for got in layers.values()}
    return whole or (last and len(sets) == 1 and len(layers) > 3)


def _layers_of(names: Iterable[str]) -> dict[tuple[str, str], set[int]]:
    """Return the numbers of the layers in which each kind of tensor occurs, by stack and name within the layer."""
    out: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if (found := layer_of(name)) is not None:
            out.setdefault((found[0], found[2]), set()).add(found[1])
    return out
