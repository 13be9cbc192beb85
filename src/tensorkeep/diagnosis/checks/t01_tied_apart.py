"""T01 tied tensors stored apart and different: the config ties head and embedding, the file holds two that differ.

What it means
    The config says that the output head is the embedding, but the file has one tensor for each, with other values.
    Which of them is used depends on the program.

How it happens
    One of the two was trained, cast or reset alone; or the config was copied from a model that ties them.

How it shows
    transformers 5 warns and unties them; torchtitan overwrites the head (logits off by 4.6 on a tiny model).

What to do
    Decide which is meant. If the head is: set `tie_word_embeddings` to false. If the tie is: drop the head.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.bytewise import SAME, bits_equal
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import same_tensor
from tensorkeep.diagnosis.evidence.originals import relation_of
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import relation, rounded
from tensorkeep.errors import word
from tensorkeep.findings import Finding
from tensorkeep.formats.names import exactly
from tensorkeep.models.alignment import tied_names

CODE = "T01"


def check(case: Case) -> Iterator[Finding]:
    """Report different head and embedding under a config that ties them; an info where the reference has the same."""
    yield from case.from_reading(CODE)
    yield from _layers(case)
    head, embed = case.tensors.get(case.head), case.tensors.get(case.embedding)
    if not case.config_ties() or head is None or embed is None:
        return
    if case.ties.get(case.head, case.head) != case.ties.get(case.embedding, case.embedding):
        return  # it is other tensors that are tied (Luke's biases)
    if {case.head, case.embedding} & (
        case.claims.keys() | case.broken.keys() | case.packed
    ) or head.parts == embed.parts:
        return
    if same_tensor(case):
        return
    mine, theirs = case.values(case.head), case.values(case.embedding)
    statuses = {n: case.comparisons[n].status for n in (case.head, case.embedding) if n in case.comparisons}
    in_reference = case.reference is not None and case.head in case.reference_tensors and case.head not in case.tied
    if in_reference and all(s in SAME for s in statuses.values()):
        message = "the config ties head and embedding and both files hold two that differ"
        yield Finding(CODE, "info", message, [case.head, case.embedding])
        return
    odd = [n for n, s in statuses.items() if s not in SAME] or [case.head, case.embedding]
    case.claim(odd, CODE)
    r = rounded(relation(mine, theirs).correlation) if head.shape == embed.shape else None
    own = {n: relation_of(case, n).to_json() for n in odd if statuses.get(n) == "values"}
    message = (
        f"the config ties head and embedding, the file holds two that differ (r = {r}); different from the reference: "
        f"{', '.join(odd)}"
    )
    evidence = {"correlation": r, "against_reference": own}
    drop = f"tensorkeep convert {word(case.path)} OUT --to hf --drop {word(exactly(case.stored(case.head)))}"
    fix = f"{drop}  # or set tie_word_embeddings to false"
    yield Finding(CODE, "error", message, odd, evidence, explains=["K02", "V06", "C01"], fix=fix)


def _layers(case: Case) -> Iterator[Finding]:
    """Report weights that layers share by the config (Zamba's), where the file holds two that differ."""
    ties = tied_names(case.model_config, case.tensors) if case.config_ties() else {}
    unread = case.claims.keys() | case.broken.keys() | case.packed
    apart = []
    for name, other in ties.items():
        mine, theirs = case.tensors.get(name), case.tensors.get(other)
        if mine is None or theirs is None or mine.parts == theirs.parts or unread & {name, other} or name == case.head:
            continue
        a, b = case.values(name), case.values(other)
        if a.shape != b.shape or not bits_equal(a, b.astype(a.dtype)):
            apart.append(name)
    if apart:
        message = f"the config ties {len(apart)} tensors to others, and the file holds two that differ of each"
        fix = "transformers 5 loads both; if the tie is meant, drop one: tensorkeep convert SRC OUT --drop NAME"
        yield Finding(CODE, "warning", message, apart, fix=fix)


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Leave an odd head out where the config ties it; which of two is meant is the user's to say."""
    if names == [case.head] and case.head in case.tensors:
        out.dropped.add(case.head)
        out.done[CODE] = "left the odd head out: the config ties it to the embedding"
    else:
        out.refused[CODE] = "your decision which of head and embedding is meant (--drop it when converting)"
