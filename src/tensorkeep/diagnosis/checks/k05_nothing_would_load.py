"""K05 nothing would load: no name in common, or no tensor at all.

What it means
    A load with `strict=False` would drop every tensor of the file, or the file holds none.

How it happens
    It is the checkpoint of another model; an empty state dict was saved; or it was made with `dcp.load({})`, which
    loads nothing and raises nothing.

How it shows
    The load "succeeds", and the loss is that of random guessing: the logarithm of the vocabulary's size, 10.8 for
    49,152 tokens.

What to do
    Compare the names in the finding with those that the model asks for, and give the right file.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation, missing, model_stored
from tensorkeep.findings import Finding

CODE = "K05"
NEEDS = "the checkpoint of this model"


def check(case: Case) -> Iterator[Finding]:
    """Report a file without tensors, or without any expected name."""
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
    if wanted is None or not wanted.shapes or not case.tensors:
        return
    # a head that may be left out says nothing unless it is there
    if any(n in case.tensors for n in wanted.shapes) or set(wanted.shapes) - {*missing(case), case.head}:
        return
    case.claim([*case.tensors, *wanted.shapes], CODE)
    stored, asked = sorted(case.tensors)[:3], sorted(wanted.shapes)[:3]
    message = f"none of its {len(case.tensors)} names is one of the {len(wanted.shapes)} that {wanted.by} has"
    evidence = {"stored": stored, "wanted": asked, "in_common": 0}
    fix = "is this the checkpoint of another model? compare: tensorkeep inspect " + case.path
    yield Finding(CODE, "error", message, (), evidence, explains=["K01", "K02", "S01"], fix=fix)
