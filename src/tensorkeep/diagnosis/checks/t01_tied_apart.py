"""T01 tied tensors stored apart and different: the config ties head and embedding, and the file holds two that differ.

What it is: two answers to one question. Which one a program uses depends on the program.
How it happens: one of the two was trained, cast or reset alone; the config was copied from a tied sibling.
How it shows: transformers 5 warns and unties; torchtitan overwrites the head (logits off by 4.6, measured).
What to do: decide which is meant. If the head is: set tie_word_embeddings to false. If the tie is: drop the head.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.sources import relation_of
from tensorkeep.diagnosis.evidence.statistics import relation, rounded
from tensorkeep.diagnosis.evidence.survey import SAME, bits_equal
from tensorkeep.findings import Finding

CODE = "T01"


def check(case: Case) -> Iterator[Finding]:
    """Two stored tensors under a config that ties them; no finding where the reference has the very same conflict."""
    yield from case.told(CODE)
    head, embed = case.tensors.get(hf.HEAD), case.tensors.get(hf.EMBEDDING)
    if not case.tie() or head is None or embed is None:
        return
    if {hf.HEAD, hf.EMBEDDING} & (case.claims.keys() | case.broken.keys() | case.packed) or head.parts == embed.parts:
        return
    mine, theirs = case.values(hf.HEAD), case.values(hf.EMBEDDING)
    if head.shape == embed.shape and bits_equal(mine, theirs.astype(mine.dtype)):
        return
    statuses = {n: case.sights[n].status for n in (hf.HEAD, hf.EMBEDDING) if n in case.sights}
    if (
        case.reference is not None
        and hf.HEAD in case.reference_tensors
        and hf.HEAD not in case.tied
        and all(s in SAME for s in statuses.values())
    ):
        yield Finding(
            CODE,
            "info",
            "the config ties head and embedding and both files hold two that differ",
            [hf.HEAD, hf.EMBEDDING],
        )
        return
    odd = [n for n, s in statuses.items() if s not in SAME] or [hf.HEAD, hf.EMBEDDING]
    case.claim(odd, CODE)
    r = rounded(relation(mine, theirs).correlation) if head.shape == embed.shape else None
    own = {n: relation_of(case, n).to_json() for n in odd if statuses.get(n) == "values"}
    yield Finding(
        CODE,
        "error",
        f"the config ties head and embedding, the file holds two that differ (r = {r}); different from the reference: {', '.join(odd)}",
        odd,
        {"correlation": r, "against_reference": own},
        explains=["K02", "V06", "C01"],
        fix=f"tensorkeep convert {case.path} OUT --to hf --drop '{case.stored(hf.HEAD)}'  # or set tie_word_embeddings to false",
    )
