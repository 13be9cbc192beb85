"""K04 root differs: the tensors lie one level deeper, or shallower, than their loader looks.

What it is: nested `{"model": state_dict}` where a flat state dict is asked for, or a prefix that all names have in
excess or lack (`model.model.layers`, `layers` for `model.layers`).
How it happens: flame's converter writes nested keys (`model.model.embed_tokens.weight`) while the torchtitan that it
pins asks for flat keys at step 0; a base model was saved without its head's class around it.
How it shows: "Missing key in checkpoint state_dict: lm_head.weight" from DCP; with strict=False or partial loading a
fresh start. flame's own nested folders are sound for `--for flame`, and torch.save files are often nested: both are
no errors.
What to do: rewrite the names (the fix below). The other way round is `--root model`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import EMA_ROOTS
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding, Severity

CODE = "K04"
_EXPLAINS = ["K01", "K02", "K05"]


def check(case: Case) -> Iterator[Finding]:
    """The root beside what the target asks for or the reference has; and prefixes that are nobody's root."""
    if case.identity is None or case.view is None or not case.tensors:
        return
    root = case.identity.root
    if root is not None and root not in EMA_ROOTS:
        severity = _severity(case, root)
        names = sorted(case.identity.names)
        if severity is not None:
            to = case.view.format if case.view.format in ("hf", "dcp", "pth") else "hf"
            yield Finding(
                CODE,
                severity,
                f"all {len(names)} tensors are nested under {root!r}; {_who(case)} asks for flat names",
                names,
                {"root": root, "wanted_root": None, "example": names[0] if names else None},
                explains=_EXPLAINS,
                fix=f"tensorkeep convert {case.path} OUT --to {to}",
            )
    if case.prefix is not None:
        yield _prefixed(case, *case.prefix)


def _severity(case: Case, root: str) -> Severity | None:
    if case.target == "flame":
        return None
    if case.target in ("hf", "torchtitan"):
        return "error"
    same = case.reference_identity is not None and case.reference_identity.root == root
    if case.reference is None or same:
        return None
    return "error"


def _who(case: Case) -> str:
    return {"hf": "transformers", "torchtitan": "torchtitan"}.get(case.target or "", "the reference")


def _prefixed(case: Case, kind: str, prefix: str) -> Finding:
    names = [h.parts[0].name for h in case.tensors.values()]
    # transformers itself puts a base model's missing prefix back
    mended = kind == "lost" and case.view is not None and case.view.format == "hf"
    what = f"carry {prefix!r} in excess" if kind == "extra" else f"lack {prefix!r}"
    return Finding(
        CODE,
        "warning" if mended else "error",
        f"the names {what}: no loader would find these tensors",
        names,
        {"prefix": prefix, "kind": kind},
        explains=_EXPLAINS,
        fix=_repair(case),
    )


def _repair(case: Case) -> str | None:
    return (
        f"tensorkeep repair {case.path} OUT --reference {case.reference.path}" if case.reference is not None else None
    )
