"""V05 all zeros: the tensor was never written.

What it is: every element is zero, and the reference's (or its siblings') are not.
How it happens: memory from `to_empty` on fresh pages, a sparse file whose hole was never filled, torch's Hugging Face
consolidation writing 0-d tensors as 0 (measured), a rank that saved before it had loaded.
How it shows: a zero head gives a loss of exactly ln V; a zero projection drops its branch.
What to do: convert or copy again. The values are not here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.statistics import pieces_of
from tensorkeep.findings import Finding

CODE = "V05"


def check(case: Case) -> Iterator[Finding]:
    """Zero tensors that differ from the reference; without one, zero matrices of a model."""
    if case.reference is not None:
        zero = [
            n for n in case.differing(floating=False) if not any(piece.any() for piece in pieces_of(case.values(n)))
        ]
    else:
        # biases start at zero and may well stay there
        zero = [
            n
            for n, s in scan(case).items()
            if s.constant == 0.0 and len(case.tensors[n].shape) > 1 and n not in case.claims
        ]
    if not zero:
        return
    case.claim(zero, CODE)
    count = sum(int(np.prod(case.tensors[n].shape)) for n in zero)
    yield Finding(
        CODE,
        "error",
        f"{len(zero)} tensors are all zeros: never written",
        zero,
        {"elements": count},
        explains=["V06"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}"
        if case.reference is not None
        else None,
    )
