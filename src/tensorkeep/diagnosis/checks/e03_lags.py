"""E03 EMA lags (decay or steps): the average is still near where it began.

What it means
    After n updates at decay d the average (EMA) still holds the share d^n of its start: 90 % after 1,000 updates at
    0.9999. The decay does not fit the length of the run; or the average is kept in a dtype that loses small updates
    (in one case a bf16 average moved 3.6 % of the way where fp32 moved 39 %).

How it shows
    Evaluation with the average is far worse than without, most of all early in training and in short runs.

How it is found
    Where the file says decay and number of updates, by arithmetic. With the initial weights as `--reference`, by the
    coefficient of (start - live) in (average - live). Otherwise by distance alone, as a warning.

What to do
    Let the decay grow, min(decay, (1 + n) / (10 + n)); choose it by the length of the run; keep the average in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.ema import Average, array, average, bare, entries, floating_distances
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "E03"
_TOO_MUCH = 0.1  # of the start still in the average
_FAR = 0.3  # relative distance of averaged and live weights that no settled run shows


def check(case: Case) -> Iterator[Finding]:
    """Warn where the average still holds much of its start, by the best evidence there is."""
    found = average(case)
    if found is None:
        return
    moved = {n: m for n, m in floating_distances(case).items() if m[0] > 0}
    narrow = sorted(
        {found.view[found.pairs[n][0]].dtype for n in moved if DTYPES[found.view[found.pairs[n][0]].dtype].bits < 32}
    )
    figures: dict[str, object] = {"average_dtypes": narrow} if narrow else {}
    apart = (
        math.sqrt(sum(a * a for a, _ in moved.values()) / max(sum(b * b for _, b in moved.values()), 1e-300))
        if moved
        else 0.0
    )
    figures["relative_distance"] = round(apart, 4)
    left, how = _left(found), "decay and updates"
    if left is None:
        left, how = _from_start(case, found, list(moved)), "the reference as its start"
    if left is not None and left > _TOO_MUCH:
        message = f"the average still holds {left:.0%} of its start ({how})"
        yield Finding(CODE, "warning", message, sorted(moved), {**figures, "share_of_start": round(left, 4)})
    elif left is None and apart > _FAR:
        message = f"averaged and live weights are {apart:.0%} apart: the average lags, or is of another model"
        yield Finding(CODE, "warning", message, sorted(moved), figures)
    if narrow:
        message = f"the average is kept in {', '.join(narrow)}, which swallows small updates; keep it in F32"
        yield Finding(CODE, "info", message, sorted(moved), figures)


def _left(found: Average) -> float | None:
    """Return decay ** updates, where the file holds both."""
    decay = next((float(v) for n, v in entries(found.view, "decay", "ema_decay") if 0 < v < 1), None)
    updates = next(
        (v for n, v in entries(found.view, "updates", "num_updates", "n_averaged", "ema_updates") if 0 < v < 1e15), None
    )
    return None if decay is None or updates is None else decay**updates


def _from_start(case: Case, found: Average, names: list[str]) -> float | None:
    """Return the coefficient of (start - live) in (average - live), over the tensors that the reference has."""
    top = bottom = 0.0
    start_of = {bare(n): n for n in case.reference_tensors}
    for name in names:
        hub = case.reference_tensors.get(start_of.get(name, name))
        averaged, live = found.pairs[name]
        if hub is None or hub.shape != found.view[live].shape or not DTYPES[hub.dtype].floating:
            continue
        now = array(found.view, live)
        start = case.reference_values(start_of.get(name, name)).astype(np.float32) - now
        top += float(np.sum((array(found.view, averaged) - now) * start, dtype=np.float64))
        bottom += float(np.sum(np.square(start), dtype=np.float64))
    return top / bottom if bottom > 0 else None
