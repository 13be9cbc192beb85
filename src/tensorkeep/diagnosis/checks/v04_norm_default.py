"""V04 norm at its default: a norm's gain is exactly one or zero, or off by one.

What it means
    The gain of a norm is what its module starts with (one, or zero for norms that add one), or all zeros, or the
    reference's plus or minus one: then the convention of Gemma, which stores gain - 1, was mixed with everybody
    else's.

How it happens
    The norm's name did not match and `strict=False` hid it: input_layernorm, post_attention_layernorm and OLMo 2's
    post_feedforward_layernorm are easily confused.

How it shows
    One norm of a middle layer at one: +1.7 of loss. All of them: +12. Off by one: +11 to +21.

What to do
    Load the norm from the source. Where the reference is the source, `tensorkeep repair` takes it from there with
    `--take-from-reference NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.conversion import architecture
from tensorkeep.diagnosis.evidence.case import Array, Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.diagnosis.evidence.tensor_names import is_norm
from tensorkeep.findings import Finding

CODE = "V04"
_TRAINED = 0.1  # how far training moves the gains of a norm, as a whole and among themselves


def check(case: Case) -> Iterator[Finding]:
    """Report norms at their default, and norms that are the reference's off by one."""
    if case.reference is None:
        yield from _alone(case)
        return
    found = {
        n: state
        for n in case.differing()
        if is_norm(n) and (state := _state(*case.pair(n), bias=n.endswith((".bias", ".beta")))) is not None
    }
    if not found:
        return
    case.claim(found, CODE)
    case.results["norms"] = found
    counts = {word: list(found.values()).count(word) for word in dict.fromkeys(found.values())}
    what = ", ".join(f"{count} {word}" for word, count in counts.items())
    message = f"{len(found)} norms are not the reference's: {what}"
    yield Finding(
        CODE, "error", message, list(found), {"states": counts}, explains=["V06"], fix=case.repair_command(found)
    )


def _state(mine: Array, theirs: Array, bias: bool) -> str | None:
    """Say in words how a norm differs from the reference's; None for any other difference, and for a bias of zeros."""
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    for value, word in ((1.0, "exactly one"), (0.0, "all zeros")):
        if (a == value).all() and not (b == value).all() and not (bias and value == 0):
            return word
    if not np.isfinite(a).all() or not a.size:
        return None
    apart, size = a - b, max(1.0, float(np.abs(a).max()), float(np.abs(b).max()))
    step = (2.0**-7 if mine.itemsize <= 2 else 2.0**-20) * size
    for by, word in ((1.0, "one too large"), (-1.0, "one too small")):
        if np.abs(apart - by).max() <= step or (abs(apart.mean() - by) < _TRAINED and apart.std() < _TRAINED):
            return word
    return None


def _alone(case: Case) -> Iterator[Finding]:
    """Report norms at their default beside norms that were trained."""
    seen = scan(case)
    norms = [n for n in seen if is_norm(n) and n.endswith("weight") and len(case.tensors[n].shape) == 1]
    default = 0.0 if (case.config or {}).get("model_type") in architecture.OFFSET_BY_ONE else 1.0
    stuck = [n for n in norms if seen[n].constant in (default, 0.0)]
    if not stuck or len(norms) - len(stuck) < max(len(stuck), 1):
        return
    case.claim(stuck, CODE)
    message = (
        f"{len(stuck)} norms are exactly {seen[stuck[0]].constant:g} everywhere, {len(norms) - len(stuck)} others are "
        "trained"
    )
    yield Finding(
        CODE, "error", message, stuck, {"value": seen[stuck[0]].constant, "trained_norms": len(norms) - len(stuck)}
    )


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """A norm that is off by one was rounded there: what it was before is the reference's to say."""
    out.lose(names, CODE)
