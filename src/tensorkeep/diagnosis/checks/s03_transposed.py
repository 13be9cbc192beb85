"""S03 transposed: the tensor is the reference's with its two dimensions exchanged.

What it means
    Rows are columns. The shape shows it only where the matrix is not square.

How it happens
    One library keeps weights as [in, out] (GPT-2's Conv1D, Flax, TensorFlow), another as [out, in].

How it shows
    As a size mismatch where the matrix is not square. Square matrices load, and the loss is 6 to 8 too high.

What to do
    Transpose them back: `tensorkeep repair` does it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.bytewise import SAME, bits_equal
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.diagnosis.evidence.originals import ALIKE, fits_better, relation_of
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.findings import Finding

CODE = "S03"


def check(case: Case) -> Iterator[Finding]:
    """Report matrices that equal the reference transposed; without a reference, by shape alone."""
    names = _by_content(case) if case.reference is not None else _by_shape(case)
    if not names:
        return
    case.claim(names, CODE)
    square = [n for n in names if len(set(case.tensors[n].shape)) == 1]
    message = f"{len(names)} matrices are transposed ({len(square)} of them square, which no shape shows)"
    evidence = {"square": len(square), "oblong": len(names) - len(square)}
    yield Finding(CODE, "error", message, names, evidence, explains=["S01"], fix=case.repair_command())


def _by_content(case: Case) -> list[str]:
    """Find matrices that equal the reference's transposed, up to rounding and training."""
    found = []
    for name in case.shared():
        mine, theirs = case.tensors[name].shape, case.reference_tensors[name].shape
        if name in case.claims or len(mine) != 2 or mine != theirs[::-1] or case.comparisons[name].status in SAME:
            continue
        a, b = case.pair(name)
        own = relation_of(case, name).correlation if mine == theirs else 0.0
        if own > ALIKE:
            continue
        if (bits_equal(a[0], b[:, 0]) and bits_equal(a, b.T)) or fits_better(relation(a, b.T).correlation, own):
            found.append(name)
    return found


def _by_shape(case: Case) -> list[str]:
    """Find matrices whose shape is the expected one the other way round."""
    wanted = expectation(case)
    shapes = wanted.shapes if wanted is not None else {}
    turned = [
        n
        for n, h in case.tensors.items()
        if n in shapes and len(h.shape) == 2 and h.shape != shapes[n] and h.shape == shapes[n][::-1]
    ]
    return [n for n in turned if n not in case.claims and n not in case.packed]


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Transpose the matrices back."""
    for name in names:
        out.recipes[name] = lambda name=name: np.ascontiguousarray(case.values(name).T)  # type: ignore[misc]
        out.shapes[name] = case.tensors[name].shape[::-1]
    out.done[CODE] = f"transposed {len(names)} matrices"
