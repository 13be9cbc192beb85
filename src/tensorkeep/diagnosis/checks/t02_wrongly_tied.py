"""T02 wrongly tied: head and embedding hold the same values though the model does not tie them.

What it is: one overwrote the other. The config says `tie_word_embeddings: false`, or the reference has two tensors.
How it happens: a tool that never saw an untied model "repairs" the tie; tie_weights() ran under a wrong config before
the save; torchtitan's adapter re-makes a head from the embedding.
How it shows: a loss of 8 and more: the logits come from another matrix.
What to do: the overwritten tensor is lost here; take it from the source (or the reference, if that is the source).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.survey import SAME, bits_equal
from tensorkeep.findings import Finding

CODE = "T02"


def check(case: Case) -> Iterator[Finding]:
    """Equal head and embedding: against a reference where they differ (error), or against the config alone (warning)."""
    head, embed = case.tensors.get(hf.HEAD), case.tensors.get(hf.EMBEDDING)
    if (
        head is None
        or embed is None
        or head.shape != embed.shape
        or head.dtype != embed.dtype
        or {hf.HEAD, hf.EMBEDDING} & case.broken.keys()
    ):
        return
    if case.reference is None:
        if case.tie() is False and bits_equal(case.values(hf.HEAD), case.values(hf.EMBEDDING)):
            yield Finding(
                CODE,
                "warning",
                "head and embedding hold the same values, the config does not tie them",
                [hf.HEAD, hf.EMBEDDING],
                {"tied": False},
            )
        return
    changed = [
        n
        for n in (hf.HEAD, hf.EMBEDDING)
        if n in case.sights and case.sights[n].status not in (*SAME, "shape") and n not in case.claims
    ]
    if not changed or hf.EMBEDDING not in case.reference_tensors or _tied_there(case):
        return
    if head.parts != embed.parts and not bits_equal(case.values(hf.HEAD), case.values(hf.EMBEDDING)):
        return
    case.claim(changed, CODE)
    other = hf.EMBEDDING if changed == [hf.HEAD] else hf.HEAD
    yield Finding(
        CODE,
        "error",
        f"{' and '.join(changed)} holds {other}'s values; in the reference they differ and are not tied",
        changed,
        {"overwritten": changed, "by": other},
        explains=["V06", "C01", "T01", "K01"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _tied_there(case: Case) -> bool:
    """Whether the reference's own head and embedding are one."""
    first, second = case.reference_tensors.get(hf.HEAD), case.reference_tensors[hf.EMBEDDING]
    if first is None or first.parts == second.parts:
        return True
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and bits_equal(case.reference_values(hf.HEAD), case.reference_values(hf.EMBEDDING))
    )
