"""K02 unexpected tensor: the checkpoint holds a name that neither the reference nor the config's architecture has.

What it means
    No parameter and no persistent buffer of the model is waiting for this tensor.

How it happens
    A buffer that the model computes by itself was saved (`rotary_emb.inv_freq`, through named_buffers()); a layer or
    a head of another model was left in; a name was misspelt, and then the right one is missing (K01).

How it shows
    Strict loads refuse it, transformers warns, PyTorch's DCP never asks for it.

What to do
    Leave it out by name: `tensorkeep convert CKPT OUT --to hf --drop NAME`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import missing, model_stored, unexpected
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.findings import Finding, Severity
from tensorkeep.formats.names import drops

CODE = "K02"


def check(case: Case) -> Iterator[Finding]:
    """Report names that nothing asks for, buffers that the model computes among them."""
    yield from case.from_reading(CODE)
    if case.view is None or not model_stored(case):
        return
    extra = [n for n in unexpected(case) if n not in case.claims]
    buffers = _buffers(case)
    if not extra and not buffers:
        return
    names = [*extra, *buffers]
    lost = missing(case)
    near = {n: close for n in extra[:20] if (close := difflib.get_close_matches(n, lost, 2, 0.75))}
    evidence: dict[str, object] = {
        "unexpected": len(names),
        "computed_buffers": len(buffers),
        **({"near": near} if near else {}),
    }
    # a buffer that the model computes anew is harmless where nothing was said of what should be there
    severity: Severity = "error" if extra or case.reference is not None else "info"
    what = "buffers that the model computes from its config" if not extra else "tensors that nothing asks for"
    fix = f"{case.convert_command()} {drops([_stored(case, n) for n in names], case.view or ())}"
    yield Finding(CODE, severity, f"{len(names)} {what}", names, evidence, fix=fix)


def _buffers(case: Case) -> list[str]:
    """Return stored buffers that the model computes by itself and that the reference does not store."""
    if case.identity is None or case.identity.naming not in (None, "hf"):
        return []
    clean = case.identity.names
    mine = [clean.get(s.parts[0].name, s.parts[0].name) for s in case.left_out if s.reason.startswith("a buffer")]
    others = case.reference_identity.names if case.reference_identity is not None else {}
    theirs = {others.get(s.parts[0].name, s.parts[0].name) for s in case.reference_left_out}
    return [n for n in mine if n not in theirs]


def _stored(case: Case, name: str) -> str:
    """Return the name under which the checkpoint stores a tensor or buffer."""
    names = case.identity.names if case.identity is not None else {}
    return next((stored for stored, clean in names.items() if clean == name), case.stored(name))


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Leave out what the model does not have."""
    out.dropped |= set(names)
    out.done[CODE] = f"left out {len(names)} tensors"
