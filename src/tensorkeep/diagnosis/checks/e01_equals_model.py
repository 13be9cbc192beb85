"""E01 EMA equals the model: the average is a plain copy of the live weights.

What it is
    Every tensor of the averaged copy has the value of the live one. An average over more than one update never does.

How it happens
    The average was never updated; it was made again on resume; a decay of 0; evaluation swapped the averaged weights
    in and the save came before they were swapped out again, or the live weights were loaded over both.

How it shows
    Evaluation "with EMA" equals evaluation without. After a swap that was not undone, training goes on from averaged
    weights with the optimizer's moments of others.

What to do
    At step 0 it is right. Later: load the average on resume, update it after every optimizer step, and save outside
    the swap.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.ema import average, entries, floating
from tensorkeep.findings import Finding

CODE = "E01"


def check(case: Case) -> Iterator[Finding]:
    """A warning where averaged and live copy agree in every floating tensor."""
    found = average(case)
    if found is None:
        return
    pairs = floating(case)
    if len(pairs) < 2 or any(apart for apart, _ in pairs.values()):
        return
    steps = dict(entries(found.view, "step", "epoch", "iteration", "global_step"))
    started = any(value > 0 for value in steps.values())
    yield Finding(
        CODE,
        "warning",
        f"the average ({found.root}) equals the live weights in all {len(pairs)} floating tensors"
        + (", although training has begun" if started else ""),
        sorted(pairs),
        {"tensors": len(pairs), **steps},
    )
