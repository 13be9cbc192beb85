"""O04 rows reordered: the rows (or columns) are the reference's in another order.

What it means
    The content is all there in the wrong order: a vocabulary shifted by one, the shards of a tensor joined in the
    wrong order, heads moved along, query heads grouped for another number of key and value heads, experts of a
    stacked tensor exchanged.

How it happens
    A map of ids is off by one, processes were sorted as text, or a reshape has its groups in the wrong place.

How it shows
    Not in names or shapes. Measured: vocabulary shifted by one +6 (tied) to +12 of loss, heads regrouped +9, shards
    +17.

What to do
    Put them back: `tensorkeep repair` does it bit for bit where every row is there once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorkeep.conversion import architecture
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.orders import Order, describe, find_order, find_order_loosely
from tensorkeep.diagnosis.evidence.originals import constant, fits_better, relation_of
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.findings import Finding

CODE = "O04"
_LIKELY = 0.98  # r above which no order of many rows can have changed; fewer rows are looked for where most are equal
LOOSE = 0.8  # r below which rows are looked for by direction: they may have been rounded or trained as well
_LARGEST = 1 << 27  # elements beyond which columns are not searched: they need a transposed copy


def check(case: Case) -> Iterator[Finding]:
    """Report tensors that hold the reference's rows, or else columns, in another order."""
    if case.reference is None:
        return
    found: dict[str, Order] = {}
    for name in case.differing(floating=False):
        order = _order(case, name)
        if order is not None:
            found[name] = order
    found |= _follow(case, found)
    if not found:
        return
    case.claim(found, CODE)
    case.results["rows"] = found
    unit = architecture.head_dim(case.model_config or {})
    rules: dict[str, list[str]] = {}
    evidence: dict[str, object] = {}
    for name, order in found.items():
        words, numbers = describe(order, unit)
        rules.setdefault(words, []).append(name)
        evidence[name] = numbers
    lost = {n: o.unmatched for n, o in found.items() if not o.invertible}
    message = "; ".join(f"{words} in {len(names)} tensors" for words, names in list(rules.items())[:3])
    evidence = {"orders": dict(list(evidence.items())[:32]), **({"rows_not_found": lost} if lost else {})}
    yield Finding(CODE, "error", message, list(found), evidence, explains=["V06"], fix=case.repair_command())


def _order(case: Case, name: str) -> Order | None:
    """Find the order of one tensor's rows or columns, by bytes first and then by direction."""
    mine, theirs = case.pair(name)
    if mine.ndim == 0 or constant(mine):
        return None
    if mine.ndim == 1 or mine.size == max(mine.shape):
        return _order_of_elements(mine.reshape(-1), theirs.reshape(-1))
    if relation_of(case, name).correlation > _LIKELY and not _mostly_equal_rows(mine, theirs):
        return None
    order = find_order(mine, theirs)
    if order is None and mine.size <= _LARGEST:
        order = find_order(mine, theirs, axis=1)
    if order is None and relation_of(case, name).correlation < LOOSE:
        order = find_order_loosely(mine, theirs)
        if order is None and mine.size <= _LARGEST:
            order = find_order_loosely(mine, theirs, axis=1)
    return order


def _follow(case: Case, found: dict[str, Order]) -> dict[str, Order]:
    """Find biases in the order of their weight's rows, and a head in that of the embedding's or the other way round.

    So few values, or values that training moved so far, prove no order by themselves; one that is known they can.
    """
    out = {}
    words = next((o for n, o in found.items() if layer_of(n) is None and not o.axis and not o.unmatched), None)
    for name in case.differing():
        order = found.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        if order is None and layer_of(name) is None and len(case.tensors[name].shape) == 2:
            order = words
        if (
            name in found
            or order is None
            or order.axis
            or order.unmatched
            or case.tensors[name].shape[:1] != order.index.shape
        ):
            continue
        mine, theirs = (v.astype(np.float64) for v in case.pair(name))
        if fits_better(relation(mine, theirs[order.index]).correlation, relation_of(case, name).correlation):
            out[name] = order
    return out


def _order_of_elements(mine: Array, theirs: Array) -> Order | None:
    """Find the order of a vector, only where it holds the very same values, since single values prove little."""
    if len(mine) < 8 or not np.array_equal(
        np.sort(mine.view(f"u{mine.itemsize}")), np.sort(theirs.view(f"u{theirs.itemsize}"))
    ):
        return None
    return find_order(mine, theirs)


def _mostly_equal_rows(mine: Array, theirs: Array) -> bool:
    """Say whether at least two rows differ, and fewer than half."""
    rows = (mine != theirs).reshape(len(mine), -1).any(axis=1)
    return bool(rows.mean() < 0.5 and rows.sum() >= 2)


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Put rows or columns back in order; an order that cannot be undone is lost."""
    for name in names:
        order = case.results["rows"][name]
        if not order.invertible:
            out.lose([name], CODE)
            continue
        out.recipes[name] = lambda name=name, order=order: _reordered(case.values(name), order.inverse, order.axis)  # type: ignore[misc]
    out.done[CODE] = f"put the rows of {len(names)} tensors back"


def _reordered(values: Array, back: Any, axis: int) -> Array:
    if axis:
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, back]).reshape(values.shape)
    made: Array = values[back]
    return made
