"""V07 corrupted elements: flipped bits, or a damaged block, in a tensor that is otherwise the reference's.

What it is: a few elements differ, often by one bit each or by orders of magnitude; or a run of elements, or whole rows,
were overwritten; every other element is bit for bit the reference's.
How it happens: memory, disk or network without error correction; a lost page; two writers in one file.
How it shows: a flipped exponent is a weight of 1e38 and a loss of NaN; a mantissa bit shows nowhere. DCP has no
checksum that anybody verifies.
What to do: copy the file again, and look at the machine. The fix below takes the damaged elements from the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.casts import passage
from tensorkeep.diagnosis.evidence.movement import Touch, touch, trained_further
from tensorkeep.diagnosis.evidence.statistics import largest, relation
from tensorkeep.findings import Finding

CODE = "V07"
FEW = 64  # elements: faults of bits are few, and every element is then looked at
MOST = 1 << 20  # damaged elements that are compared one by one
PART = 0.5  # a damaged block leaves at least half of its tensor as it was


def check(case: Case) -> Iterator[Finding]:
    """Tensors of which few elements differ, or a part that was destroyed."""
    if case.reference is None:
        return
    names = case.differing(floating=False)
    found: dict[str, Touch] = {}
    for name in names:
        seen = touch(case, name)
        if seen.count > 0 and seen.share < PART and _damaged(case, name, seen):
            found[name] = seen
    if not found:
        return
    case.claim(found, CODE)
    elements = sum(t.count for t in found.values())
    flips = sum(t.count for t in found.values() if t.count <= FEW and set(t.bits) == {1})
    what = f"{flips} flipped bits" if flips == elements else f"{elements} damaged elements"
    yield Finding(
        CODE,
        "error",
        f"{what} in {len(found)} tensors; every other element is the reference's",
        list(found),
        {
            "elements": elements,
            "flipped_bits": flips,
            "tensors": {n: _evidence(case, n, t) for n, t in list(found.items())[:16]},
        },
        explains=["V06"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _damaged(case: Case, name: str, seen: Touch) -> bool:
    mine, theirs = case.pair(name)
    if passage(mine, theirs) is not None and seen.count > 1:
        return False
    if trained_further(case):
        return _destroyed(mine, theirs)
    return seen.count <= FEW or seen.count <= 1e-3 * seen.of or _destroyed(mine, theirs)


def _destroyed(mine: Array, theirs: Array) -> bool:
    """Whether the elements that differ no longer resemble the reference's; training moves them by a little."""
    at = np.flatnonzero(mine.reshape(-1) != theirs.reshape(-1))
    at = at[:: at.size // MOST + 1]
    a, b = mine.reshape(-1)[at].astype(np.float64), theirs.reshape(-1)[at].astype(np.float64)
    if a.size and float(np.abs(a).max()) > 100 * max(largest(theirs), 1e-30):
        return True
    if a.size < 8:
        return bool((np.abs(a - b) > 0.5 * np.maximum(np.abs(a), np.abs(b))).all())
    return relation(a, b).correlation < 0.5 and float(np.linalg.norm(a - b)) > 0.5 * float(np.linalg.norm(b))


def _evidence(case: Case, name: str, seen: Touch) -> dict[str, object]:
    mine, theirs = case.pair(name)
    flat, wanted = mine.reshape(-1), theirs.reshape(-1)
    shown = {"first": seen.first, "last": seen.last, "count": seen.count, "of": seen.of}
    value = {"stored": float(flat[seen.first]), "reference": float(wanted[seen.first])}
    return {**shown, **{k: v if np.isfinite(v) else str(v) for k, v in value.items()}}
