"""T02 wrongly tied: head and embedding hold the same values though the model does not tie them.

What it means
    One overwrote the other: the config says `tie_word_embeddings: false`, or the reference has two different tensors.

How it happens
    A tool that assumes tied models "repairs" the tie; tie_weights() ran under a wrong config before the save; or
    torchtitan's adapter made a new head from the embedding.

How it shows
    As a loss of 8 and more, since the logits come from another matrix.

What to do
    The overwritten tensor is lost in this file. Take it from the source (or from the reference, if that is the
    source).
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.bytewise import bits_equal
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.findings import Finding

CODE = "T02"
_APART = 0.2  # difference of r that says which of two trained tensors is where it was


def check(case: Case) -> Iterator[Finding]:
    """Report equal head and embedding where the reference's differ (error) or the config unties them (warning)."""
    head, embed = case.tensors.get(case.head), case.tensors.get(case.embedding)
    if (
        head is None
        or embed is None
        or head.shape != embed.shape
        or head.dtype != embed.dtype
        or {case.head, case.embedding} & case.broken.keys()
    ):
        return
    if case.reference is None:
        if case.config_ties() is False and bits_equal(case.values(case.head), case.values(case.embedding)):
            message = "head and embedding hold the same values, the config does not tie them"
            yield Finding(CODE, "warning", message, [case.head, case.embedding], {"tied": False})
        return
    changed = [n for n in (case.head, case.embedding) if case.changed(n) and n not in case.claims]
    if not changed or case.embedding not in case.reference_tensors or _tied_there(case):
        return
    if head.parts != embed.parts and not bits_equal(case.values(case.head), case.values(case.embedding)):
        return
    if len(changed) == 2:  # trained further: the one that was overwritten resembles the other's reference
        own = {n: relation(*case.pair(n)).correlation for n in changed}
        changed = [min(changed, key=own.__getitem__)] if abs(own[case.head] - own[case.embedding]) > _APART else changed
    case.claim(changed, CODE)
    other = case.embedding if changed == [case.head] else case.head
    message = f"{' and '.join(changed)} holds {other}'s values; in the reference they differ and are not tied"
    evidence = {"overwritten": changed, "by": other}
    yield Finding(
        CODE,
        "error",
        message,
        changed,
        evidence,
        explains=["V06", "C01", "T01", "K01"],
        fix=case.repair_command(changed),
    )


def _tied_there(case: Case) -> bool:
    """Say whether the reference's own head and embedding are one."""
    first, second = case.reference_tensors.get(case.head), case.reference_tensors[case.embedding]
    if first is None or first.parts == second.parts:
        return True
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and bits_equal(case.reference_values(case.head), case.reference_values(case.embedding))
    )


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """A tensor that was overwritten by the other is lost."""
    out.lose(names, CODE)
