"""K04 root differs: the tensors lie one level deeper, or shallower, than their loader looks.

What it means
    The tensors are nested as `{"model": {...}}` where a flat list of names is asked for; or all names have one prefix
    too much or too little (`model.model.layers`, or `layers` for `model.layers`).

How it happens
    flame's converter writes nested names (`model.model.embed_tokens.weight`) while the torchtitan that it uses asks
    for flat ones at step 0. Or the inner model was saved without the class that adds the head.

How it shows
    DCP says "Missing key in checkpoint state_dict: lm_head.weight". With `strict=False` or partial loading, training
    starts from random weights. flame's own nested folders are fine with `--for flame`, and torch.save files are often
    nested: neither is reported as an error.

What to do
    Write it again under the right names with the command below the finding. `--root model` goes the other way.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import EMA_ROOTS
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.findings import Finding, Severity

CODE = "K04"
_EXPLAINS = ["K01", "K02", "K05"]


def check(case: Case) -> Iterator[Finding]:
    """Report tensors nested otherwise than the target or the reference has them, and a prefix on all names."""
    if case.identity is None or case.view is None or not case.tensors:
        return
    root = case.identity.root
    if root is not None and root not in EMA_ROOTS:
        severity = _severity(case, root)
        names = sorted(case.identity.names)
        if severity is not None:
            message = f"all {len(names)} tensors are nested under {root!r}; {_who(case)} asks for flat names"
            evidence = {"root": root, "wanted_root": None, "example": names[0] if names else None}
            yield Finding(CODE, severity, message, names, evidence, explains=_EXPLAINS, fix=case.convert_command())
    if case.prefix is not None:
        yield _prefixed(case, *case.prefix)


def _severity(case: Case, root: str) -> Severity | None:
    """Say how bad a root is for the target or beside the reference; None where it is right."""
    if case.target == "flame":
        return None
    if case.target in ("hf", "torchtitan"):
        return "error"
    same = case.reference_identity is not None and case.reference_identity.root == root
    if case.reference is None or same:
        return None
    # a training program keeps its own saves so, and a resume of it finds them
    return "info" if case.view is not None and "home" in case.view.metadata else "error"


def _who(case: Case) -> str:
    """Name the program, or the reference, that asks for flat names."""
    return {"hf": "transformers", "torchtitan": "torchtitan"}.get(case.target or "", "the reference")


def _prefixed(case: Case, kind: str, prefix: str) -> Finding:
    """Report a prefix that all names have too much, or lack."""
    names = [h.parts[0].name for h in case.tensors.values()]
    # transformers itself puts a base model's missing prefix back
    mended = kind == "lost" and case.view is not None and case.view.format == "hf"
    what = f"carry {prefix!r} in excess" if kind == "extra" else f"lack {prefix!r}"
    finds = "transformers puts it back, no other loader" if mended else "no loader"
    message = f"the names {what}: {finds} would find these tensors"
    evidence = {"prefix": prefix, "kind": kind}
    return Finding(
        CODE, "warning" if mended else "error", message, names, evidence, explains=_EXPLAINS, fix=case.repair_command()
    )


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Reading already took the names apart; nothing is left to do."""
    out.done[CODE] = "names"
