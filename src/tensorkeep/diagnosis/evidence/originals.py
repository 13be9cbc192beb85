"""Find whose content a tensor holds, when it does not hold its own: the original, a tensor of the reference.

Candidates have the same shape. The first elements pick among them and the whole content decides; for weights that
were also trained or rounded, correlation decides instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.evidence.bytewise import bits_equal, hf_bytes
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.statistics import Relation, correlation, relation
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.formats.arrays import np_dtype, np_frombuffer

_PRINT = 1024  # elements of a fingerprint
OWN = 0.999  # a tensor that correlates this well with its own reference holds it
ALIKE = 0.9  # r above which rounded or trained content is still the same content
SMALLEST = 256  # elements of a matrix below which correlation decides nothing


class Original(NamedTuple):
    """The reference's tensor whose content a tensor of another name holds; `exact`: bit for bit, up to a cast."""

    name: str
    exact: bool
    correlation: float


def relation_of(case: Case, name: str) -> Relation:
    """Measure, once for all checks, how a tensor relates to the reference's of its name."""
    found: dict[str, Relation] = case.results.setdefault("relations", {})
    if name not in found:
        found[name] = relation(*case.pair(name))
    return found[name]


def fits_better(other: float, own: float) -> bool:
    """Say by two correlations whether a tensor holds other content than its own name's.

    Training takes a tensor away from where it started, and not towards another one: what was trained far, and then
    moved, still resembles its origin far more than what it should be.
    """
    return other > 0.5 and 1 - other < 0.5 * (1 - own)


def constant(a: Array) -> bool:
    """Say whether all elements are equal: such content does not tell one tensor from another."""
    return a.size > 0 and bool((a.reshape(-1) == a.reshape(-1)[0]).all())


def originals(case: Case, names: Iterable[str] | None = None) -> dict[str, Original]:
    """Find the tensors that hold another tensor's content, once for all checks.

    Args:
        case: The case, with a reference.
        names: The tensors to look at; by default all that differ and that no check has explained.

    Returns:
        The original of each tensor that has one, by the tensor's name.
    """
    kept: dict[str, Original | None] = case.results.setdefault("originals", {})
    asked = list(case.differing() if names is None else names)
    for name in asked:
        if name not in kept:
            kept[name] = _original(case, name) if relation_of(case, name).correlation < OWN else None
    return {n: s for n in asked if (s := kept[n]) is not None}


def _original(case: Case, name: str) -> Original | None:
    """Find the reference's tensor of another name that holds the content of this one."""
    mine = case.values(name)
    if constant(mine):
        return None
    first = _finite(mine.reshape(-1)[:_PRINT])
    best: tuple[float, str] | None = None
    for other in _candidates(case)[case.tensors[name].shape]:
        if other == name:
            continue
        theirs = _fingerprint(case, other, case.tensors[name].dtype)
        if np.array_equal(first, theirs) and bits_equal(*case.pair(name, other)):
            return Original(other, True, 1.0)
        if mine.ndim > 1 and mine.size >= SMALLEST:
            r = correlation(first, theirs)
            best = max(best or (r, other), (r, other))
    own = relation_of(case, name).correlation
    if mine.ndim == 1:
        return _exchanged(case, name)
    if best is None or not fits_better(best[0], own):
        return None
    r = relation(*case.pair(name, best[1])).correlation
    return Original(best[1], False, r) if fits_better(r, own) else None


def _exchanged(case: Case, name: str) -> Original | None:
    """Find the vector of the same layer that changed places with this one: each is far nearer to the other's original.

    Gains of norms resemble each other, so correlation does not tell them apart, and one alone proves nothing.
    """
    layer = layer_of(name)
    for other in _candidates(case)[case.tensors[name].shape]:
        if other == name or other not in case.tensors or case.tensors[other].shape != case.tensors[name].shape:
            continue
        beside = layer_of(other)
        if layer is None or beside is None or beside[:2] != layer[:2]:
            continue
        if all(_distance(case, a, b) < 0.5 * _distance(case, a, a) for a, b in ((name, other), (other, name))):
            return Original(other, False, relation(*case.pair(name, other)).correlation)
    return None


def _distance(case: Case, name: str, other: str) -> float:
    """Return the distance of a vector from the reference's vector of a name."""
    mine, theirs = case.pair(name, other)
    return float(np.linalg.norm(_finite(mine) - _finite(theirs)))


def _candidates(case: Case) -> dict[tuple[int, ...], list[str]]:
    """Group the reference's tensors by shape."""
    classes: dict[tuple[int, ...], list[str]] | None = case.results.get("classes")
    if classes is None:
        classes = defaultdict(list)
        for name, hub in case.reference_tensors.items():
            if name not in case.packed and name not in case.tied:
                classes[hub.shape].append(name)
        case.results["classes"] = classes
    return classes


def _fingerprint(case: Case, name: str, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the first elements of a reference tensor, rounded to `dtype` where that is narrower."""
    prints: dict[tuple[str, str], np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = case.results.setdefault(
        "prints", {}
    )
    if (name, dtype) not in prints:
        hub: HfTensor = case.reference_tensors[name]
        first = next(hf_bytes(hub, case.views), memoryview(b""))
        values = np_frombuffer(bytes(first[: _PRINT * 8]), hub.dtype)[:_PRINT]
        with np.errstate(over="ignore", invalid="ignore"):
            if np_dtype(dtype).itemsize < values.dtype.itemsize:
                values = values.astype(np_dtype(dtype))
            prints[name, dtype] = _finite(values)
    return prints[name, dtype]


def _finite(values: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return values as float64 with zeros for what is not finite."""
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
