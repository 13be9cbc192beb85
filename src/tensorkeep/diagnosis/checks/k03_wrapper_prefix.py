"""K03 wrapper prefix: `module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `base_model.model.`

What it is: every name, or those of some modules, carries what DDP, torch.compile, FSDP1, activation checkpointing or
PEFT put into the names of the modules that they wrap.
How it happens: state_dict() of the wrapped model was saved instead of the model's own.
How it shows: a strict load lists every tensor as missing and unexpected; with strict=False nothing is loaded and the
loss starts at ln V.
What to do: take the prefix off (the fix below does it for every tensor at once), and save `model.module` or
`model._orig_mod` next time.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.formats.names import unwrap

CODE = "K03"


def check(case: Case) -> Iterator[Finding]:
    """Wrapped names, unless the reference is wrapped in the same way or PEFT's own adapter names are meant."""
    yield from case.told(CODE)
    if case.identity is None or case.view is None or not case.tensors:
        return
    same = case.reference_identity is not None and set(case.identity.wrappers) <= set(case.reference_identity.wrappers)
    if not case.identity.wrappers or same:
        return
    wrapped = [n for n in case.identity.names if unwrap(n)[1]]
    found = ", ".join(case.identity.wrappers)
    to = case.view.format if case.view.format in ("hf", "dcp", "pth") else "hf"
    yield Finding(
        CODE,
        "error",
        f"{len(wrapped)} of {len(case.identity.names)} names carry {found}: a strict load finds none of them",
        wrapped,
        {"wrappers": list(case.identity.wrappers), "wrapped": len(wrapped), "of": len(case.identity.names)},
        explains=["K01", "K02", "K04", "K05"],
        fix=f"tensorkeep convert {case.path} OUT --to {to}",
    )
