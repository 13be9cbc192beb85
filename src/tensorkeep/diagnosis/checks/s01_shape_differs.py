"""S01 shape differs: the tensor has another shape than the reference, or than the config's architecture asks for.

What it is: neither a padded vocabulary (S02) nor a transposition (S03) says why.
How it happens: another size of the same family, another number of heads or experts, a shard taken for the whole, a
fused tensor taken for one of its parts.
How it shows: a size mismatch when it is loaded.
What to do: compare config.json with the weights; gather the shards before converting.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.findings import Finding

CODE = "S01"


def check(case: Case) -> Iterator[Finding]:
    """Shapes that differ and that nothing explained."""
    yield from case.told(CODE)
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
    yield Finding(
        CODE,
        "error",
        f"{len(names)} tensors have another shape than {wanted.by} asks for, first {first}: "
        f"{list(case.tensors[first].shape)}, expected {list(wanted.shapes[first])}",
        names,
        {"shapes": shown},
    )
