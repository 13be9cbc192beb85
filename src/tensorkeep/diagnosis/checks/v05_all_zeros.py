"""V05 all zeros: the tensor was never written.

What it means
    Every element is zero, and those of the reference, or of similar tensors, are not. As a warning: one half
    of each of an adapter's pairs is zero, as before training, so the adapter changes nothing.

How it happens
    A model built on the meta device kept fresh memory; a hole in a sparse file was never filled; a process saved
    before it had loaded; PyTorch's consolidation of Hugging Face shards writes tensors of one number as 0. An adapter
    was saved before its first step, or from another copy of the model than the one that trained.

How it shows
    A zero head gives the loss of random guessing, to all digits. A zero projection switches its branch off.

What to do
    Convert or copy again. The values are not in this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.adapters import checkpoint_adapter
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.statistics import pieces_of
from tensorkeep.findings import Finding

CODE = "V05"


def check(case: Case) -> Iterator[Finding]:
    """Report zero tensors that differ from the reference; without one, zero matrices; and adapters that do nothing."""
    yield from _idle_adapter(case)
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
    message = f"{len(zero)} tensors are all zeros: never written"
    yield Finding(CODE, "error", message, zero, {"elements": count}, explains=["V06"], fix=case.repair_command(zero))


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)


def _idle_adapter(case: Case) -> Iterator[Finding]:
    """Warn of an adapter of which every pair has a half of zeros."""
    adapter = checkpoint_adapter(case)
    pairs = {**adapter.pairs, **adapter.embeddings} if adapter is not None else {}
    if adapter is None or not pairs or adapter.magnitudes or adapter.biases or adapter.saved:
        return
    if any(adapter.view.array(a).any() and adapter.view.array(b).any() for a, b in pairs.values()):
        return
    names = sorted(n for pair in pairs.values() for n in pair)
    message = f"one half of each of the adapter's {len(pairs)} pairs is zero, as before training: it changes nothing"
    yield Finding(CODE, "warning", message, names, {"pairs": len(pairs)})
