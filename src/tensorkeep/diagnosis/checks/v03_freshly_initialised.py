"""V03 freshly initialised: the tensor was never loaded; it holds what the initialiser drew.

What it means
    The values have nothing to do with the reference's (correlation below 0.05) and look drawn one by one from a
    normal or uniform distribution. Trained matrices have more extreme values, and rows of very different norms.

How it happens
    The tensor was missing, or its name did not match, and `strict=False` hid it; a fused tensor was loaded into a
    copy; post_init() ran after the load.

How it shows
    It depends on the tensor. One q_proj of thirty: +0.03 of loss. A whole middle layer: +0.23. The last layer: +2.6.
    A head of its own: +8.

What to do
    Load or convert again. The values are not in this file.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.originals import constant, relation_of
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.statistics import Spread, rounded, spread
from tensorkeep.diagnosis.evidence.tensor_names import is_norm
from tensorkeep.findings import Finding

CODE = "V03"
# without a reference the limits are narrow (`Spread` says what was measured), and there must be trained tensors beside
# the fresh ones: a whole model may be new on purpose
_FRESH_ROWS = 1.12
_FRESH_KURTOSIS = (2.9, 3.1)


def check(case: Case) -> Iterator[Finding]:
    """Report tensors unrelated to the reference with random values; without one, random tensors beside trained ones."""
    if case.reference is None:
        yield from _alone(case)
        return
    found: dict[str, Spread] = {}
    for name in case.differing():
        values = case.values(name)
        if (
            values.size < 64
            or (is_norm(name) and values.ndim == 1)
            or not relation_of(case, name).unrelated
            or constant(values)
        ):
            continue
        drawn = spread(values)
        if drawn.fresh:
            found[name] = drawn
    if not found:
        return
    case.claim(found, CODE)
    worst = max(abs(relation_of(case, n).correlation) for n in found)
    message = f"{len(found)} tensors hold fresh random values, not the reference's (|r| at most {worst:.3f})"
    evidence = {
        "largest_correlation": rounded(worst),
        "statistics": {n: s.to_json() for n, s in list(found.items())[:16]},
    }
    yield Finding(CODE, "error", message, list(found), evidence, explains=["V06"], fix=case.repair_command(found))


def _alone(case: Case) -> Iterator[Finding]:
    """Report random matrices beside at least as many trained ones, without a reference."""
    looked = {
        n: s.spread
        for n, s in scan(case).items()
        if s.spread is not None and n not in case.claims and len(case.tensors[n].shape) > 1
    }
    fresh = {
        n: s
        for n, s in looked.items()
        if s.count >= 4096
        and s.row_spread < _FRESH_ROWS
        and s.column_spread < _FRESH_ROWS
        and _FRESH_KURTOSIS[0] < s.kurtosis < _FRESH_KURTOSIS[1]
    }
    trained = [
        n
        for n, s in looked.items()
        if s.count >= 4096 and n not in fresh and (s.row_spread > 1.2 or s.column_spread > 1.2)
    ]
    # beside quantized weights, which are not looked at, one trained tensor says too little
    if not fresh or len(trained) < max(len(fresh), 2 if case.packed else 1):
        return
    case.claim(fresh, CODE)
    message = f"{len(fresh)} tensors look freshly initialised beside {len(trained)} trained ones"
    evidence = {"statistics": {n: s.to_json() for n, s in list(fresh.items())[:16]}, "trained_siblings": len(trained)}
    yield Finding(CODE, "error", message, list(fresh), evidence)


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)
