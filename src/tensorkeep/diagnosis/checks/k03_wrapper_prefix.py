"""K03 wrapper prefix: names carry `module.`, `_orig_mod.`, `base_model.model.` or what another wrapper adds.

What it means
    All names, or those of some modules, carry what a wrapper puts into the names of the module that it wraps: DDP
    (`module.`), torch.compile (`_orig_mod.`), FSDP1 (`_fsdp_wrapped_module.`), activation checkpointing
    (`_checkpoint_wrapped_module.`) or PEFT (`base_model.model.`).

How it happens
    The state_dict() of the wrapped model was saved instead of the model's own.

How it shows
    A strict load lists every tensor as missing and as unexpected. With `strict=False` nothing is loaded, and training
    starts from random weights.

What to do
    Take the prefix off; `tensorkeep convert` does it for every tensor at once. Next time save `model.module` or
    `model._orig_mod`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.findings import Finding
from tensorkeep.formats.names import unwrap

CODE = "K03"


def check(case: Case) -> Iterator[Finding]:
    """Report names with a wrapper's prefix, unless the reference has the same wrappers."""
    yield from case.from_reading(CODE)
    if case.identity is None or case.view is None or not case.tensors:
        return
    same = case.reference_identity is not None and set(case.identity.wrappers) <= set(case.reference_identity.wrappers)
    if not case.identity.wrappers or same:
        return
    wrapped = [n for n in case.identity.names if unwrap(n)[1]]
    found = ", ".join(case.identity.wrappers)
    message = f"{len(wrapped)} of {len(case.identity.names)} names carry {found}: a strict load finds none of them"
    evidence = {"wrappers": list(case.identity.wrappers), "wrapped": len(wrapped), "of": len(case.identity.names)}
    yield Finding(
        CODE, "error", message, wrapped, evidence, explains=["K01", "K02", "K04", "K05"], fix=case.convert_command()
    )


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Reading already took the names apart; nothing is left to do."""
    out.done[CODE] = "names"
