"""S04 dtype differs without loss: the values are the reference's, stored in another dtype (an info).

What it is: a copy in bf16 or fp16 of an fp32 model, or an fp32 copy of a bf16 one. "Without loss" means that every
value is the reference's, rounded once at most; how many were rounded is in the evidence.
How it happens: transformers 4 loads in fp32 and torchtitan exports fp32: the file doubles. Serving wants bf16.
How it shows: only in size. Bf16 against fp32 changes the loss by less than 0.01.
What to do: nothing, unless you meant to keep the dtype. Values that overflow are another finding (V02).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "S04"


def check(case: Case) -> Iterator[Finding]:
    """Tensors that equal the reference after the cast that their dtype implies."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in case.shared():
        sight = case.sights.get(name)
        if sight is not None and sight.status == "cast" and not lossy(case, name):
            groups.setdefault((case.reference_tensors[name].dtype, case.tensors[name].dtype), []).append(name)
    for (theirs, mine), names in groups.items():
        rounded = sum(case.sights[n].rounded for n in names)
        what = f"rounded once ({rounded:,} values changed by it)" if rounded else "every value exact"
        evidence = {
            "reference_dtype": theirs,
            "dtype": mine,
            "rounded": rounded,
            "vanished": sum(case.sights[n].vanished for n in names),
        }
        yield Finding(
            CODE, "info", f"{len(names)} tensors are {mine}, the reference's are {theirs}; {what}", names, evidence
        )


def lossy(case: Case, name: str) -> bool:
    """Whether a cast lost more than rounding to a 16-bit float does: eight-bit floats without scales, or overflow."""
    sight = case.sights[name]
    narrow = DTYPES[case.tensors[name].dtype].bits < 16 <= DTYPES[case.reference_tensors[name].dtype].bits
    return sight.overflowed > 0 or (narrow and sight.rounded > 0)
