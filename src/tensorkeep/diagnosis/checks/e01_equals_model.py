"""E01 EMA equals the model: the average is a plain copy of the live weights.

What it means
    Every tensor of the averaged copy (EMA) has the value of the live one. An average over more than one update never
    does.

How it happens
    The average was never updated, was made anew on resume, or has a decay of 0. Or evaluation put the averaged
    weights into the model and the save came before they were taken out again; or the live weights were loaded over
    both.

How it shows
    Evaluation with the average gives the same as without. Where averaged weights stayed in the model, training goes
    on from them with an optimizer state that belongs to others.

What to do
    At step 0 it is right. Later: load the average on resume, update it after every optimizer step, and save only
    while the live weights are in the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.ema import average, entries, floating_distances
from tensorkeep.findings import Finding

CODE = "E01"


def check(case: Case) -> Iterator[Finding]:
    """Warn where averaged and live copy agree in every floating tensor."""
    found = average(case)
    if found is None:
        return
    pairs = floating_distances(case)
    if len(pairs) < 2 or any(apart for apart, _ in pairs.values()):
        return
    steps = dict(entries(found.view, "step", "epoch", "iteration", "global_step"))
    started = any(value > 0 for value in steps.values())
    message = f"the average ({found.root}) equals the live weights in all {len(pairs)} floating tensors" + (
        ", although training has begun" if started else ""
    )
    yield Finding(CODE, "warning", message, sorted(pairs), {"tensors": len(pairs), **steps})
