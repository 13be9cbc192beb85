"""K05 nothing would load: no name in common, or no tensor at all.

What it is: every key of the file would be dropped by a load with strict=False, or the file holds nothing.
How it happens: a checkpoint of another model; `dcp.load({})`, which loads nothing and raises nothing; an empty state
dict that was saved.
How it shows: "successful" load, loss ln V (10.8 for 49152 words).
What to do: compare the names below with what the model asks for; give the right file.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation, model_stored
from tensorkeep.findings import Finding

CODE = "K05"


def check(case: Case) -> Iterator[Finding]:
    """No tensor, or none of the expected names."""
    if case.view is None or not model_stored(case) or any(code == "K08" for code in case.claims.values()):
        return
    if not case.view.records:
        case.claim(case.reference_tensors, CODE)
        yield Finding(
            CODE,
            "error",
            "there is no tensor in it",
            (),
            {"tensors": 0},
            explains=["K01"],
            fix="give the model's own file",
        )
        return
    wanted = expectation(case)
    if wanted is None or not wanted.shapes or any(n in wanted.shapes for n in case.tensors) or not case.tensors:
        return
    case.claim([*case.tensors, *wanted.shapes], CODE)
    stored, asked = sorted(case.tensors)[:3], sorted(wanted.shapes)[:3]
    yield Finding(
        CODE,
        "error",
        f"none of its {len(case.tensors)} names is one of the {len(wanted.shapes)} that {wanted.by} has",
        (),
        {"stored": stored, "wanted": asked, "in_common": 0},
        explains=["K01", "K02", "S01"],
        fix="is this the checkpoint of another model? compare: tensorkeep inspect " + case.path,
    )
