"""S01 shape differs: the tensor has another shape than the reference, or than the config's architecture asks for.

What it means
    The shape is wrong, and neither a padded vocabulary (S02) nor a transposition (S03) says why.

How it happens
    Another size of the same family; another number of heads or experts; a shard taken for the whole; a fused tensor
    taken for one of its parts.

How it shows
    As a size mismatch when it is loaded.

What to do
    Compare config.json with the weights. Gather shards before you convert.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.findings import Finding

CODE = "S01"


def check(case: Case) -> Iterator[Finding]:
    """Report shapes that differ and that no other check explained."""
    yield from case.from_reading(CODE)
    wanted = expectation(case)
    if wanted is None:
        return
    names = [n for n, h in case.tensors.items() if n in wanted.shapes and h.shape != wanted.shapes[n]]
    names = [n for n in names if n not in case.claims and n not in case.packed and n not in case.broken]
    if not names:
        return
    case.claim(names, CODE)
    shown = {n: {"shape": list(case.tensors[n].shape), "expected": list(wanted.shapes[n])} for n in names[:20]}
    first = names[0]
    message = (
        f"{len(names)} tensors have another shape than {wanted.by} asks for, first {first}: "
        f"{list(case.tensors[first].shape)}, expected {list(wanted.shapes[first])}"
    )
    yield Finding(CODE, "error", message, names, {"shapes": shown})


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """What was destroyed is lost."""
    out.lose(names, CODE)
