"""Sources: which tensor of the reference a tensor really holds, when it does not hold its own.

Candidates are those of the same shape. A fingerprint (the first elements) picks them, the whole content decides; for
weights that were also trained or rounded, correlation decides instead.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.comparison import hub_bytes
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.statistics import Relation, correlation, relation
from tensorkeep.diagnosis.evidence.survey import bits_equal
from tensorkeep.formats.arrays import np_dtype, np_frombuffer

_PRINT = 1024  # elements of a fingerprint
OWN = 0.999  # a tensor that correlates this well with its own reference holds it
ALIKE = 0.9  # r above which rounded or trained content is still the same content
SMALLEST = 4096  # elements below which correlation decides nothing (norm gains of all layers resemble each other)


class Source(NamedTuple):
    """The reference tensor whose content another holds; `exact` up to a cast."""

    name: str
    exact: bool
    correlation: float


def relation_of(case: Case, name: str) -> Relation:
    """How the checkpoint's tensor relates to its own reference; kept."""
    found: dict[str, Relation] = case.orders.setdefault("relations", {})
    if name not in found:
        found[name] = relation(*case.pair(name))
    return found[name]


def constant(a: Array) -> bool:
    """Whether all elements are equal: such content belongs to nobody."""
    return a.size > 0 and bool((a.reshape(-1) == a.reshape(-1)[0]).all())


def sources(case: Case, names: Iterable[str] | None = None) -> dict[str, Source]:
    """For each differing tensor that holds another's content: whose. Kept, since several checks ask."""
    kept: dict[str, Source | None] = case.orders.setdefault("sources", {})
    asked = list(case.differing() if names is None else names)
    for name in asked:
        if name not in kept:
            kept[name] = _source(case, name) if relation_of(case, name).correlation < OWN else None
    return {n: s for n in asked if (s := kept[n]) is not None}


def _source(case: Case, name: str) -> Source | None:
    mine = case.values(name)
    if constant(mine):
        return None
    start = _start(mine.reshape(-1)[:_PRINT])
    best: tuple[float, str] | None = None
    for other in _candidates(case)[case.tensors[name].shape]:
        if other == name:
            continue
        theirs = _fingerprint(case, other, case.tensors[name].dtype)
        if np.array_equal(start, theirs) and bits_equal(*case.pair(name, other)):
            return Source(other, True, 1.0)
        if mine.size >= SMALLEST:
            r = correlation(start, theirs)
            best = max(best or (r, other), (r, other))
    own = relation_of(case, name).correlation
    if best is None or best[0] < ALIKE - 0.1 or own > 0.5:
        return None
    r = relation(*case.pair(name, best[1])).correlation
    return Source(best[1], False, r) if r > ALIKE else None


def _candidates(case: Case) -> dict[tuple[int, ...], list[str]]:
    classes: dict[tuple[int, ...], list[str]] | None = case.orders.get("classes")
    if classes is None:
        classes = defaultdict(list)
        for name, hub in case.reference_tensors.items():
            if name not in case.packed and name not in case.tied:
                classes[hub.shape].append(name)
        case.orders["classes"] = classes
    return classes


def _fingerprint(case: Case, name: str, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The first elements of a reference tensor, rounded to the checkpoint's dtype where that is narrower."""
    prints: dict[tuple[str, str], np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = case.orders.setdefault(
        "prints", {}
    )
    if (name, dtype) not in prints:
        hub: HfTensor = case.reference_tensors[name]
        first = next(hub_bytes(hub, case.views), memoryview(b""))
        values = np_frombuffer(bytes(first[: _PRINT * 8]), hub.dtype)[:_PRINT]
        with np.errstate(over="ignore", invalid="ignore"):
            if np_dtype(dtype).itemsize < values.dtype.itemsize:
                values = values.astype(np_dtype(dtype))
            prints[name, dtype] = _start(values)
    return prints[name, dtype]


def _start(values: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def layer_of(name: str) -> tuple[str, int, str] | None:
    """The stack, number and kind of a layer's tensor, by the first number in its name.

    >>> layer_of("model.layers.3.mlp.experts.7.w")
    ('model.layers.', 3, 'mlp.experts.7.w')
    """
    found = re.match(r"((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.+)\Z", name)
    return (found[1], int(found[2]), found[3]) if found else None
