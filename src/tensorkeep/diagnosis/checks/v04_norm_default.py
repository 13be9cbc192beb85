"""V04 norm at its default: a norm's gain is exactly one or zero, or off by one.

What it is: the gain of a norm is what its module starts with (ones; zeros for norms that add one), all zeros, or the
reference's plus or minus one: the two conventions of Gemma and of everybody else were mixed.
How it happens: the norm's name did not match (input_layernorm, post_attention_layernorm and OLMo2's
post_feedforward_layernorm are easily confused) and strict=False hid it.
How it shows: ONE norm of a middle layer at one: +1.7 of loss, the "4 to 5 instead of 2". All of them: +12. Off by one:
+11 to +21.
What to do: load the norm from the source. Off by one is undone by the fix below.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence import architecture
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.words import is_norm
from tensorkeep.findings import Finding

CODE = "V04"


def check(case: Case) -> Iterator[Finding]:
    """Constant norms, and norms that are the reference's off by one."""
    if case.reference is None:
        yield from _alone(case)
        return
    found = {n: state for n in case.differing() if is_norm(n) and (state := _state(*case.pair(n))) is not None}
    if not found:
        return
    case.claim(found, CODE)
    case.orders["norms"] = found
    counts = {word: list(found.values()).count(word) for word in dict.fromkeys(found.values())}
    what = ", ".join(f"{count} {word}" for word, count in counts.items())
    yield Finding(
        CODE,
        "error",
        f"{len(found)} norms are not the reference's: {what}",
        list(found),
        {"states": counts},
        explains=["V06"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _state(mine: Array, theirs: Array) -> str | None:
    """ones, zeros, plus one, minus one; None for anything else."""
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    for value, word in ((1.0, "exactly one"), (0.0, "all zeros")):
        if (a == value).all() and not (b == value).all():
            return word
    step = 2.0**-7 if mine.itemsize <= 2 else 2.0**-20
    for by, word in ((1.0, "one too large"), (-1.0, "one too small")):
        if np.isfinite(a).all() and np.abs(a - b - by).max(initial=0.0) <= step * max(
            1.0, float(np.abs(a).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
        ):
            return word
    return None


def _alone(case: Case) -> Iterator[Finding]:
    """A norm at its default beside norms that were trained."""
    seen = scan(case)
    norms = [n for n in seen if is_norm(n) and n.endswith("weight") and len(case.tensors[n].shape) == 1]
    default = 0.0 if (case.config or {}).get("model_type") in architecture.OFFSET_BY_ONE else 1.0
    stuck = [n for n in norms if seen[n].constant in (default, 0.0)]
    if not stuck or len(norms) - len(stuck) < max(len(stuck), 1):
        return
    case.claim(stuck, CODE)
    yield Finding(
        CODE,
        "error",
        f"{len(stuck)} norms are exactly {seen[stuck[0]].constant:g} everywhere, {len(norms) - len(stuck)} others are trained",
        stuck,
        {"value": seen[stuck[0]].constant, "trained_norms": len(norms) - len(stuck)},
    )
