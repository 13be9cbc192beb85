"""A05 does nothing: an adapter, or some layers of it, leaves the base's weights as they are.

What it means
    One half of a low-rank pair is zero, so their product is; or a whole tensor or row that should replace the base's
    is the base's own. As a warning for all of an adapter, and for some of its layers where others were trained.

How it happens
    An adapter was saved before its first step, or from another copy of the model than the one that trained. A
    part of it got no gradient: a module that a fused kernel computes around, layers that pipeline or ZeRO did not
    gather before saving, experts that no token reached, a head that PEFT kept whole and nobody trained.

How it shows
    Nothing complains: the model loads, and answers as the base does, or as if fewer layers had been trained.

How it is found
    Every B of LoRA starts at zero, so zeros there say that no step was taken. Merges look at what was added, and say as
    well where it is too small for the dtype that is written.

What to do
    Look at the training: is this the copy that trained, and did each targeted module get a gradient? Save again, or
    take what did nothing out of the targets.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.adapters.reading import Adapter
from tensorkeep.diagnosis.evidence.adapters import checkpoint_adapter
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped

CODE = "A05"


def check(case: Case) -> Iterator[Finding]:
    """Warn of an adapter of which every pair has a half of zeros, or some have."""
    adapter = checkpoint_adapter(case)
    pairs = {**adapter.pairs, **adapter.embeddings} if adapter is not None else {}
    if adapter is None or not pairs:
        return
    idle = [m for m, (a, b) in pairs.items() if not _any(adapter, a) or not _any(adapter, b)]
    if not idle:
        return
    names = sorted(n for m in idle for n in pairs[m])
    case.claim([n for n in names if n in case.tensors], CODE)
    rest = adapter.magnitudes or adapter.biases or adapter.saved or adapter.tokens
    if len(idle) < len(pairs) or rest:
        message = (
            f"{len(idle)} of the adapter's {len(pairs)} pairs have a half of zeros and change nothing: "
            f"{', '.join(grouped(idle)[:4])}"
        )
    else:
        message = (
            f"one half of each of the adapter's {len(pairs)} pairs is zero, as before training: it changes nothing"
        )
    yield Finding(CODE, "warning", message, names, {"pairs": len(pairs), "idle": len(idle)})


def _any(adapter: Adapter, stored: str) -> bool:
    """Whether a tensor holds anything but zeros."""
    return bool(adapter.view.array(stored).any())
