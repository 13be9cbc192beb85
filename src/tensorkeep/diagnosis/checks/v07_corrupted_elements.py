"""V07 corrupted elements: flipped bits, or a damaged block, in a tensor that is otherwise the reference's.

What it means
    A few elements differ, often by one bit each or by orders of magnitude, or a run of elements or whole rows were
    overwritten. Every other element is the reference's, bit for bit; or, where the checkpoint was trained further, it
    moved as in training, and what is named is a row of zeros or over 100 times as large as any of the reference's.

How it happens
    Memory, disk or network without error correction; a lost page; two writers in one file.

How it shows
    A flipped bit in an exponent is a weight of 1e38 and a loss of NaN; in the last digits it shows nowhere. DCP files
    have no checksum that anybody verifies.

What to do
    Copy the file again, and have the machine checked. With `--take-from-reference NAME`, `tensorkeep repair` takes the
    damaged elements from the reference; not where the checkpoint was trained further: nobody knows which they are then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.casts import find_cast
from tensorkeep.diagnosis.evidence.movement import Changed, barely_moved, changed_elements, resembles, trained_further
from tensorkeep.diagnosis.evidence.remedy import Remedies, heal
from tensorkeep.diagnosis.evidence.statistics import largest, relation
from tensorkeep.diagnosis.evidence.tensor_names import layer_of
from tensorkeep.findings import Finding, counted

CODE = "V07"
FEW = 64  # elements: faults of bits are few, and every element is then looked at
MOST = 1 << 20  # damaged elements that are compared one by one
PART = 0.5  # a damaged block leaves at least half of its tensor as it was


def check(case: Case) -> Iterator[Finding]:
    """Report tensors of which few elements differ, or a part was destroyed."""
    if case.reference is None:
        return
    names = case.differing(floating=False)
    found: dict[str, Changed] = {}
    for name in names:
        seen = changed_elements(case, name)
        if seen.count > 0 and seen.share < PART and _damaged(case, name, seen):
            found[name] = seen
    trained = _rounded_away(case, found, names)
    found = {n: seen for n, seen in found.items() if n not in trained}
    yield from _beyond_training(case, [n for n in names if n not in found])
    if not found:
        return
    case.claim(found, CODE)
    elements = sum(t.count for t in found.values())
    flips = sum(t.count for t in found.values() if t.count <= FEW and set(t.bits) == {1})
    what = counted(elements, "flipped bit" if flips == elements else "damaged element")
    message = f"{what} in {counted(len(found), 'tensor')}; every other element is the reference's"
    evidence = {
        "elements": elements,
        "flipped_bits": flips,
        "tensors": {n: _evidence(case, n, t) for n, t in list(found.items())[:16]},
    }
    yield Finding(CODE, "error", message, list(found), evidence, explains=["V06"], fix=case.repair_command(found))


def _beyond_training(case: Case, names: Sequence[str]) -> Iterator[Finding]:
    """Report matrices that were trained, but for some values that no training makes."""
    lost = {n: count for n in names if (count := _impossible(*case.own_pair(n), inside=layer_of(n) is not None))}
    case.results["beyond training"] = set(lost)
    if not lost:
        return
    case.claim(lost, CODE)
    elements = sum(lost.values())
    message = (
        f"{counted(elements, 'damaged element')} in {counted(len(lost), 'tensor')}: rows of zeros, or over 100 "
        "times as large as any of the reference's; the rest moved as in training"
    )
    evidence = {"elements": elements, "tensors": dict(list(lost.items())[:16])}
    yield Finding(CODE, "error", message, list(lost), evidence, explains=["V06"])


def _impossible(mine: Array, theirs: Array, inside: bool) -> int:
    """Count values that no training makes in a matrix of which the rest resembles the reference's.

    These are rows of zeros in a layer (`inside`; in an embedding they may be words that nobody uses), and values of
    another size altogether.
    """
    if mine.ndim < 2 or mine.dtype.itemsize < 2 or mine.size < FEW:
        return 0
    a, b = mine.reshape(len(mine), -1), theirs.reshape(len(mine), -1)
    empty: Array = np.logical_and(~a.any(axis=1), b.any(axis=1)) & inside
    limit = 100 * max(largest(theirs), 1e-30)
    if not empty.any() and largest(mine) <= limit:
        return 0
    wrong = np.asarray(np.abs(a.astype(np.float64)) > limit) | np.asarray(empty)[:, None]
    count = int(np.count_nonzero(wrong))
    if not 0 < count <= 0.25 * wrong.size:
        return 0
    return count if resembles(relation(a[~wrong], b[~wrong])) else 0


def _rounded_away(case: Case, found: Mapping[str, Changed], names: Sequence[str]) -> set[str]:
    """Find tensors of which few elements moved because training in 16 bits rounds most of its steps away.

    Several tensors that barely moved are that, and tensors whose like in other layers moved as well. One tensor alone
    is not, where every element that differs does so by one bit.
    """
    barely = {n for n in found if barely_moved(case, n)}
    if len(barely) == 1 and set(found[min(barely)].bits) == {1}:
        barely.clear()
    kinds = Counter(_kind(n) for n in names)
    alike = {n for n in found if kinds[_kind(n)] > 1 and not _destroyed(*case.own_pair(n))}
    return barely | alike


def _kind(name: str) -> str:
    """Return a name without its layer."""
    found = layer_of(name)
    return name if found is None else f"{found[0]}*.{found[2]}"


def _damaged(case: Case, name: str, seen: Changed) -> bool:
    """Say whether the elements that differ were damaged, and not cast or trained."""
    mine, theirs = case.own_pair(name)
    if find_cast(mine, theirs) is not None and seen.count > 1:
        return False
    if _destroyed(mine, theirs):
        return True
    few = min(FEW, max(3, seen.of // 16))
    return not trained_further(case) and (seen.count <= few or seen.count <= 1e-3 * seen.of)


def _destroyed(mine: Array, theirs: Array) -> bool:
    """Say whether the elements that differ no longer resemble the reference's; training moves them by a little."""
    at = np.flatnonzero(mine.reshape(-1) != theirs.reshape(-1))
    at = at[:: at.size // MOST + 1]
    a, b = mine.reshape(-1)[at].astype(np.float64), theirs.reshape(-1)[at].astype(np.float64)
    if a.size and float(np.abs(a).max()) > 100 * max(largest(theirs), 1e-30):
        return True
    if a.size < 8:
        return bool((np.abs(a - b) > 0.5 * np.maximum(np.abs(a), np.abs(b))).all())
    return relation(a, b).correlation < 0.5 and float(np.linalg.norm(a - b)) > 0.5 * float(np.linalg.norm(b))


def _evidence(case: Case, name: str, seen: Changed) -> dict[str, object]:
    """Return where a tensor differs, with the first pair of values."""
    mine, theirs = case.own_pair(name)
    flat, wanted = mine.reshape(-1), theirs.reshape(-1)
    shown = {"first": seen.first, "last": seen.last, "count": seen.count, "of": seen.of}
    value = {"stored": float(flat[seen.first]), "reference": float(wanted[seen.first])}
    return {**shown, **{k: v if np.isfinite(v) else str(v) for k, v in value.items()}}


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Take the damaged elements from the reference; of a tensor that was trained it does not hold the others."""
    beyond = case.results.get("beyond training", set())
    out.lose([n for n in names if n in beyond], CODE)
    if healed := [n for n in names if n not in beyond]:
        heal(case, healed, out, CODE)
