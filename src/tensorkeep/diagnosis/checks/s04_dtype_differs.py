"""S04 dtype differs without loss: the values are the reference's, stored in another dtype (an info).

What it means
    The checkpoint is a bf16 or fp16 copy of an fp32 model, or an fp32 copy of a bf16 one. Every value is the
    reference's, rounded once at most; the finding says how many were rounded.

How it happens
    transformers 4 loads in fp32 and torchtitan exports fp32, which doubles the file. Serving wants bf16.

How it shows
    Only in the size of the file. bf16 instead of fp32 changes the loss by less than 0.01.

What to do
    Nothing, unless you meant to keep the dtype. Values that overflow are another finding (V02).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "S04"


def check(case: Case) -> Iterator[Finding]:
    """Report tensors that equal the reference after the cast that their dtype implies."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in case.shared():
        compared = case.comparisons.get(name)
        if compared is not None and compared.status == "cast" and not lossy(case, name):
            groups.setdefault((case.reference_tensors[name].dtype, case.tensors[name].dtype), []).append(name)
    for (theirs, mine), names in groups.items():
        rounded = sum(case.comparisons[n].rounded for n in names)
        what = f"rounded once ({rounded:,} values changed by it)" if rounded else "every value exact"
        evidence = {
            "reference_dtype": theirs,
            "dtype": mine,
            "rounded": rounded,
            "vanished": sum(case.comparisons[n].vanished for n in names),
        }
        yield Finding(
            CODE, "info", f"{len(names)} tensors are {mine}, the reference's are {theirs}; {what}", names, evidence
        )


def lossy(case: Case, name: str) -> bool:
    """Say whether a cast lost more than rounding to a 16-bit float does: 8-bit floats without scales, or overflow."""
    compared = case.comparisons[name]
    narrow = DTYPES[case.tensors[name].dtype].bits < 16 <= DTYPES[case.reference_tensors[name].dtype].bits
    return compared.overflowed > 0 or (narrow and compared.rounded > 0)
