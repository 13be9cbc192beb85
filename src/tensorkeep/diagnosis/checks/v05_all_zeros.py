"""V05 all zeros: the tensor was never written.

What it means
    Every element is zero, and those of the reference, or of similar tensors, are not. Zero halves of an adapter's
    pairs are A05.

How it happens
    A model built on the meta device kept fresh memory; a hole in a sparse file was never filled; a process saved
    before it had loaded; PyTorch's consolidation of Hugging Face shards writes tensors of one number as 0.

How it shows
    A zero head gives the loss of random guessing, to all digits. A zero projection switches its branch off.

What to do
    Convert or copy again. The values are not in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.statistics import pieces_of
from tensorkeep.findings import Finding

CODE = "V05"


def check(case: Case) -> Iterator[Finding]:
    """Report zero tensors that differ from the reference; without one, zero matrices."""
    if case.reference is not None:
        zero = [
            n for n in case.differing(floating=False) if not any(piece.any() for piece in pieces_of(case.values(n)))
        ]
    else:
        # biases start at zero and may well stay there, BART's [1, vocabulary] too, and RoBERTa's one type of token;
        # a head of one row (a reward model's) does not
        zero = [
            n
            for n, s in scan(case).items()
            if s.constant == 0.0 and _is_matrix(n, case.tensors[n].shape) and n not in case.claims
        ]
    if not zero:
        return
    case.claim(zero, CODE)
    count = sum(int(np.prod(case.tensors[n].shape)) for n in zero)
    message = f"{len(zero)} tensors are all zeros: never written"
    yield Finding(CODE, "error", message, zero, {"elements": count}, explains=["V06"], fix=case.repair_command(zero))


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor has more than one row, or is a linear layer's only one."""
    row = len(shape) == 2 and max(shape) > 1 and name.endswith(".weight") and "embed" not in name
    return row or sum(d > 1 for d in shape) > 1


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)
