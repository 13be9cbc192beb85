"""K01 missing tensor: the reference, or the config's own architecture, has it and the checkpoint does not.

What it is: a name that the model asks for and no file holds.
How it happens: a converter's table has no row for it (q/k norms, biases); a tied head was dropped though the config
does not tie; a rank's file was left out; a module was added after the save.
How it shows: a strict load names it. With strict=False, allow_partial_load or an adapter that skips unknown keys it
stays at its initial value: one missing norm in a middle layer costs +1.7 of loss, a missing layer +9, one missing
projection of many +0.03, which no loss check sees.
What to do: convert again from the source with a tool that covers every tensor. The values are in no other place of
this checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation, missing, model_stored, unexpected
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding

CODE = "K01"


def check(case: Case) -> Iterator[Finding]:
    """Expected names without a tensor, with the nearest names that nobody asks for."""
    yield from case.told(CODE)
    if not model_stored(case):
        return
    wanted = expectation(case)
    if wanted is None:
        if case.tensors and not case.reference_tensors:
            raise Inconclusive(_unknown(case))
        return
    lost = [n for n in missing(case) if n not in case.claims]
    if not lost:
        return
    case.claim(lost, CODE)
    extra = unexpected(case)
    near = {n: close for n in lost[:20] if (close := difflib.get_close_matches(n, extra, 2, 0.75))}
    yield Finding(
        CODE,
        "error",
        f"{len(lost)} of {len(wanted.shapes)} tensors of {wanted.by} are missing",
        lost,
        {"expected": len(wanted.shapes), "missing": len(lost), **({"near": near} if near else {})},
        fix=f"convert again from the source, or: tensorkeep repair {case.path} OUT --reference {case.reference.path}"
        if case.reference is not None
        else None,
    )


def _unknown(case: Case) -> str:
    kind = (case.config or {}).get("model_type")
    what = "there is no config" if case.config is None else f"tensorkeep has no table of the architecture {kind!r}"
    return f"{what}, so which tensors belong to the model is unknown; give --reference"
