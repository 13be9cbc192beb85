"""K01 missing tensor: the reference, or the architecture in the config, has it and the checkpoint does not.

What it means
    The model asks for a name that no file holds.

How it happens
    A converter has no rule for it (norms of q and k, biases); the head was left out although the config does not tie
    it to the embedding; the file of one process was left out; a module was added after the save.

How it shows
    A strict load names it. With `strict=False`, partial loading or a loader that skips unknown names, the tensor
    keeps its initial value. In a model of 135 M parameters one missing norm in a middle layer costs +1.7 of loss and
    a missing layer +9, but one missing projection of many +0.03, which no look at the loss reveals.

What to do
    Convert again from the source with a tool that covers every tensor. Where the values are in this checkpoint under
    another name, or fused with others, `tensorkeep repair` gives them their names back; it fills with the reference's
    only what you name with `--take-from-reference`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation, missing, model_stored, unexpected
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.errors import Inconclusive, TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.models.names import model_names

CODE = "K01"


def check(case: Case) -> Iterator[Finding]:
    """Report expected names without a tensor, with the nearest names that nothing asks for."""
    yield from case.from_reading(CODE)
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
    message = f"{len(lost)} of {len(wanted.shapes)} tensors of {wanted.by} are missing"
    evidence = {"expected": len(wanted.shapes), "missing": len(lost), **({"near": near} if near else {})}
    fix = f"convert again from the source, or: {case.repair_command(lost)}" if case.reference is not None else None
    yield Finding(CODE, "error", message, lost, evidence, fix=fix)


def _unknown(case: Case) -> str:
    """Say why it is unknown which tensors belong to the model."""
    if case.config is None:
        return "there is no config, so which tensors belong to the model is unknown; give --reference"
    try:
        model_names(case.config)
        why = "its config asks for far more than is stored"
    except TensorkeepError as error:
        why = error.line
    kind = case.config.get("model_type")
    return f"tensorkeep has no table of the architecture {kind!r} and {why}; give --reference"


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)
