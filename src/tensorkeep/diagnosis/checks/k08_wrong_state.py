"""K08 wrong state: optimizer-only, flat-parameter (FSDP1) or EMA state where a model is expected.

What it means
    The file holds training state, or the model in a form that no loader of models takes.

How it happens
    The optimizer's file was taken for the model's; FSDP1 saved LOCAL_STATE_DICT or flat parameters (one vector for
    each layer, `_flat_param`); or only the averaged copy (EMA) was kept, under a prefix of its own.

How it shows
    No name is found. With `strict=False` everything keeps its initial values.

What to do
    Give the model's own file. Flat parameters are gathered with the FSDP1 program that wrote them (FULL_STATE_DICT).
    An averaged copy can be taken on purpose: `tensorkeep convert` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import EMA_ROOTS
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import is_adapter
from tensorkeep.errors import word
from tensorkeep.findings import Finding

CODE = "K08"
NEEDS = "the model's own file"
_FLAT = ("_flat_param", "flat_param")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq", "square_avg")


def check(case: Case) -> Iterator[Finding]:
    """Report a file without a model in it, or with its averaged copy alone."""
    if case.view is None or case.identity is None or not case.view.records or is_adapter(case):
        return
    flat = [n for n in case.view if n.rpartition(".")[2].startswith(_FLAT)]
    moments = [n for n in case.view if n.rpartition(".")[2] in _MOMENTS]
    if flat:
        yield _wrong(
            case,
            flat,
            f"{len(flat)} flat parameters of FSDP1: every layer is one vector",
            "gather them with FSDP1's FULL_STATE_DICT in the program that wrote them",
        )
    elif moments and not any(
        n for n in case.identity.names if n.rpartition(".")[2] not in _MOMENTS and n.rpartition(".")[2] != "step"
    ):
        yield _wrong(case, moments, f"{len(moments)} optimizer moments and no model", "give the model's own file")
    elif not case.identity.names and case.identity.other:
        reasons = sorted(set(case.identity.other.values()))
        yield _wrong(
            case, list(case.identity.other), f"no model in it, only {', '.join(reasons)}", "give the model's own file"
        )
    elif case.identity.root in EMA_ROOTS and (case.reference is not None or case.target is not None):
        message = f"an EMA copy under {case.identity.root}, where a model is expected"
        yield _wrong(
            case,
            sorted(case.identity.names),
            message,
            f"tensorkeep convert {word(case.path)} OUT --to hf  # takes the EMA copy as the model",
            claim=False,
        )


def _wrong(case: Case, names: list[str], message: str, fix: str, claim: bool = True) -> Finding:
    """Make the finding; `claim`: this explains every other finding about names and tensors."""
    if claim:
        case.claim([*case.reference_tensors, *case.tensors], CODE)
    return Finding(
        CODE,
        "error",
        message,
        names,
        {"count": len(names)},
        explains=["K01", "K02", "K03", "K04", "K05", "S01"],
        fix=fix,
    )
