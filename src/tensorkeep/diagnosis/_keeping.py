"""Account for what a repair does to the values of its input: what stays, and what would be gone.

A repair moves values. So the multiset of a tensor's elements must be found again in the result, whatever was turned,
exchanged, renamed or split; what is not found is a loss, and is said before anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case, np_dtype_known
from tensorkeep.diagnosis.evidence.casts import find_cast
from tensorkeep.diagnosis.evidence.originals import constant
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import pieces_of
from tensorkeep.formats.names import grouped

Mark = tuple[str, int, int]  # dtype, and two sums over scrambled elements
_MASK = (1 << 64) - 1
# what lies beside a model and is no training: the model makes it anew
_COMPUTED = "a buffer that the model computes"
_UNTRAINED = ("V03", "K01")  # codes of tensors that hold nothing of their own: random numbers, or nothing


def mark(values: Array) -> Mark:
    """Return a digest of a tensor's elements that does not depend on their order, so that marks of parts add up.

    >>> mark(np.arange(4)) == mark(np.arange(4)[::-1]), mark(np.arange(4)) == mark(np.zeros(4, np.int64))
    (True, False)
    """
    first = second = 0
    for piece in pieces_of(np.ascontiguousarray(values), 1 << 20):
        bits = piece.view(f"u{piece.itemsize}").astype(np.uint64)
        mixed = _mixed(bits + np.uint64(0x9E3779B97F4A7C15))
        first += int(mixed.sum(dtype=np.uint64))
        second += int(_mixed(mixed ^ np.uint64(0x2545F4914F6CDD1D)).sum(dtype=np.uint64))
    return values.dtype.name, first & _MASK, second & _MASK


def _mixed(x: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Scramble 64-bit integers (splitmix64), so that sums of them tell multisets apart."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sum(marks: Iterable[Mark]) -> Mark:
    """Return the mark of tensors joined into one."""
    found = list(marks)
    return found[0][0], sum(m[1] for m in found) & _MASK, sum(m[2] for m in found) & _MASK


def losses(case: Case, plan: Remedies) -> dict[str, str]:
    """Find what a repair would lose of the checkpoint's own values.

    Args:
        case: The broken checkpoint with its reference.
        plan: What is to be done.

    Returns:
        What would go, in words, by the tensor's name (or by what the tensors are); {} where every value stays.
    """
    used = {p.name for p in plan.origins.values()}
    gone = [n for n in case.tensors if n in plan.dropped and n not in used and not _held_elsewhere(case, n, plan)]
    out = dict.fromkeys(gone, "left out")
    out |= {n: "replaced by the reference's" for n in plan.lost if _own_values(case, n, plan)}
    out |= {n: "some of its values" for n in _changed(case, plan)}
    if case.adapter:
        out[f"{len(case.adapter)} tensors of an adapter"] = "left out"
    beside = Counter(
        s.reason for s in case.left_out if not s.reason.startswith(_COMPUTED) and s.parts[0].name not in case.adapter
    )
    out |= {f"{count} tensors ({reason})": "left out" for reason, count in beside.items() if reason != "adapter"}
    return out


def words(lost: dict[str, str]) -> str:
    """Say in one line what would go."""
    kinds = dict.fromkeys(lost.values())
    return "; ".join(f"{what}: {', '.join(grouped(n for n, w in lost.items() if w == what)[:6])}" for what in kinds)


def _own_values(case: Case, name: str, plan: Remedies) -> bool:
    """Say whether a tensor that is to be replaced holds values that are nowhere else."""
    if name not in case.tensors or plan.lost[name] in _UNTRAINED or not np_dtype_known(case.tensors[name].dtype):
        return False
    mine = case.values(name)
    if constant(mine) or not np.isfinite(mine.astype(np.float32)).any() or _held_elsewhere(case, name, plan):
        return False
    return not _follows(case, name)


def _follows(case: Case, name: str) -> bool:
    """Say whether a tensor is the reference's after a cast, or plus or minus one, in every element."""
    if case.tensors[name].shape != case.reference_tensors[name].shape:
        return False
    mine, theirs = case.own_pair(name)
    cast = find_cast(mine, theirs)
    if cast is not None and cast.exact:
        return True
    wide = theirs.astype(np.float32)
    return any(np.array_equal((wide + by).astype(mine.dtype), mine) for by in (np.float32(1), np.float32(-1)))


def _held_elsewhere(case: Case, name: str, plan: Remedies) -> bool:
    """Say whether another tensor of the checkpoint that stays holds the same values."""
    hub = case.tensors[name]
    others = [
        n
        for n, h in case.tensors.items()
        if n != name and h.dtype == hub.dtype and h.shape == hub.shape and n not in plan.dropped and n not in plan.lost
    ]
    return any(h.parts == hub.parts for n, h in case.tensors.items() if n in others) or (
        bool(others) and mark(case.values(name)) in {mark(case.values(n)) for n in others}
    )


def _changed(case: Case, plan: Remedies) -> list[str]:
    """Return the tensors of which the result does not hold every value again, among those that are moved."""
    moved = [n for n in plan.recipes if n not in plan.lost and n not in plan.elements and n not in plan.inverted]
    made = {n: mark(plan.recipes[n]()) for n in moved}
    results = Counter(made.values())
    out = []
    whole = [n for n in moved if n in case.tensors]
    whole += sorted({p.name for p in plan.origins.values() if p.rows is None})
    for name in whole:
        own = mark(case.values(name))
        if results[own]:
            results[own] -= 1
        elif not _held_elsewhere(case, name, plan):
            out.append(name)
    for name in sorted({p.name for p in plan.origins.values() if p.rows is not None}):
        parts = [made[m] for m, p in plan.origins.items() if p.name == name]
        if _sum(parts) != mark(case.values(name)):
            out.append(name)
    return out
