"""V03 freshly initialised: the tensor was never loaded; it holds what the initialiser drew.

What it is: values that have nothing to do with the reference's (|r| < 0.05) and look drawn one by one: kurtosis of a
normal or uniform, rows and columns all alike. Trained matrices have heavier tails and rows of very different norms.
How it happens: the tensor was missing and strict=False hid it; the name did not match; a fused tensor was loaded into
a copy; post_init() ran after the load.
How it shows: it depends on the tensor. One q_proj of thirty: +0.03 of loss. One whole middle layer: +0.23. The last
layer: +2.6. An untied head: +8, ln V.
What to do: load or convert again. The values are not here.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.sources import constant, relation_of
from tensorkeep.diagnosis.evidence.statistics import Spread, rounded, spread
from tensorkeep.diagnosis.evidence.words import is_norm
from tensorkeep.findings import Finding

CODE = "V03"
# Without a reference, fresh means the facts' detector (§2.5: fresh 0.88 to 1.07, trained 1.23 and more), and trained
# siblings must stand beside, or the whole model may be new on purpose.
_FRESH_ROWS = 1.12
_FRESH_KURTOSIS = (2.9, 3.1)


def check(case: Case) -> Iterator[Finding]:
    """Uncorrelated and independent values; without a reference, fresh statistics beside trained siblings."""
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
    yield Finding(
        CODE,
        "error",
        f"{len(found)} tensors hold fresh random values, not the reference's (|r| at most {worst:.3f})",
        list(found),
        {"largest_correlation": rounded(worst), "statistics": {n: s.to_json() for n, s in list(found.items())[:16]}},
        explains=["V06"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _alone(case: Case) -> Iterator[Finding]:
    looked = {
        n: s.spread
        for n, s in scan(case).items()
        if s.spread is not None and n not in case.claims and len(case.tensors[n].shape) > 1
    }
    fresh = {
        n: s
        for n, s in looked.items()
        if s.count >= 4096
        and s.rows < _FRESH_ROWS
        and s.columns < _FRESH_ROWS
        and _FRESH_KURTOSIS[0] < s.kurtosis < _FRESH_KURTOSIS[1]
    }
    trained = [n for n, s in looked.items() if s.count >= 4096 and n not in fresh and (s.rows > 1.2 or s.columns > 1.2)]
    if not fresh or len(trained) < len(fresh):
        return
    case.claim(fresh, CODE)
    yield Finding(
        CODE,
        "error",
        f"{len(fresh)} tensors look freshly initialised beside {len(trained)} trained ones",
        list(fresh),
        {"statistics": {n: s.to_json() for n, s in list(fresh.items())[:16]}, "trained_siblings": len(trained)},
    )
