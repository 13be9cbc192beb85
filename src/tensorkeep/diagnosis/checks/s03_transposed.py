"""S03 transposed: the tensor is the reference's with its two dimensions exchanged.

What it is: rows are columns. Of a square matrix no shape shows it.
How it happens: one library keeps weights as [in, out] (GPT-2's Conv1D, Flax, TensorFlow), another as [out, in].
How it shows: a size mismatch for oblong matrices; nothing for square ones, and a loss 6 to 8 too high.
What to do: transpose them back; the fix below does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.diagnosis.evidence.sources import ALIKE, relation_of
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.diagnosis.evidence.survey import bits_equal
from tensorkeep.findings import Finding

CODE = "S03"


def check(case: Case) -> Iterator[Finding]:
    """Matrices that equal the reference after an exchange of their dimensions; by shape alone without a reference."""
    names = _by_content(case) if case.reference is not None else _by_shape(case)
    if not names:
        return
    case.claim(names, CODE)
    square = [n for n in names if len(set(case.tensors[n].shape)) == 1]
    yield Finding(
        CODE,
        "error",
        f"{len(names)} matrices are transposed ({len(square)} of them square, which no shape shows)",
        names,
        {"square": len(square), "oblong": len(names) - len(square)},
        explains=["S01"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}"
        if case.reference is not None
        else None,
    )


def _by_content(case: Case) -> list[str]:
    found = []
    for name in case.shared():
        mine, theirs = case.tensors[name].shape, case.reference_tensors[name].shape
        if (
            name in case.claims
            or len(mine) != 2
            or mine != theirs[::-1]
            or case.sights[name].status in ("equal", "cast")
        ):
            continue
        a, b = case.pair(name)
        if mine == theirs and relation_of(case, name).correlation > ALIKE:
            continue
        if (bits_equal(a[0], b[:, 0]) and bits_equal(a, b.T)) or relation(a, b.T).correlation > ALIKE:
            found.append(name)
    return found


def _by_shape(case: Case) -> list[str]:
    wanted = expectation(case)
    shapes = wanted.shapes if wanted is not None else {}
    turned = [
        n
        for n, h in case.tensors.items()
        if n in shapes and len(h.shape) == 2 and h.shape != shapes[n] and h.shape == shapes[n][::-1]
    ]
    return [n for n in turned if n not in case.claims and n not in case.packed]
