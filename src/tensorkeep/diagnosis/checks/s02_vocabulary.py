"""S02 vocabulary padded or cut: only the number of rows of embedding and head differs.

What it means
    The rows that both sides have are the same; at the end there are more, or some are missing.

How it happens
    Rows were padded to a multiple of 64 or 128 for speed; tokens were added; a loader took the larger of the
    tokenizer's and the config's size (flame does); or padding was cut off again.

How it shows
    As a size mismatch. Where that is forced through, ids beyond the rows crash, and padded rows take probability away
    from real tokens.

What to do
    Cut or pad the rows to what the config says; `tensorkeep repair` takes the reference's number, and asks before rows
    go (`--yes`). If tokens were added on purpose, put the matching config beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.findings import Finding

CODE = "S02"
ALWAYS = True  # its own repair, whatever explains it
SAME = 0.5  # r of the rows in common: rounding and training keep it, another vocabulary has none


def check(case: Case) -> Iterator[Finding]:
    """Report an embedding or head with more or fewer rows than expected, where the rows in common are alike."""
    wanted = expectation(case)
    if wanted is None:
        return
    names = [
        n
        for n in (case.embedding, case.head)
        if n in case.tensors and n in wanted.shapes and _rows_differ(case.tensors[n].shape, wanted.shapes[n])
    ]
    names = [n for n in names if n not in case.claims and (case.reference is None or _common(case, n))]
    if not names:
        return
    mine, theirs = case.tensors[names[0]].shape[0], wanted.shapes[names[0]][0]
    case.claim([*names, "config:vocab_size"], CODE)
    # rows that the checkpoint's own config asks for were added on purpose
    meant = case.config is not None and case.reference is not None and case.config.get("vocab_size") == mine
    word = "padded" if mine > theirs else "cut"
    message = f"the vocabulary is {word}: {mine} rows, {wanted.by} has {theirs}"
    evidence = {"rows": mine, "expected": theirs, "difference": mine - theirs}
    yield Finding(
        CODE,
        "warning" if meant else "error",
        message,
        names,
        evidence,
        explains=["S01", "C01", "C02"],
        fix=case.repair_command(),
    )


def _rows_differ(mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Say whether two matrices have as many columns and other numbers of rows."""
    return len(mine) == len(theirs) == 2 and mine[1] == theirs[1] and mine[0] != theirs[0]


def _common(case: Case, name: str) -> bool:
    """Say whether the rows that both sides have are alike."""
    mine, theirs = case.pair(name)
    rows = min(len(mine), len(theirs))
    same = np.array_equal(mine[: min(rows, 64)].view(np.uint8), theirs[: min(rows, 64)].view(np.uint8))
    return same or relation(mine[:rows], theirs[:rows]).correlation > SAME


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Bring embedding and head to the reference's number of rows; rows that are missing are lost."""
    for name in names:
        rows = case.reference_tensors[name].shape[0]
        if rows > case.tensors[name].shape[0]:
            out.lose([name], CODE)
        else:
            out.recipes[name] = lambda name=name, rows=rows: case.values(name)[:rows]  # type: ignore[misc]
            out.shapes[name] = case.reference_tensors[name].shape
    out.done[CODE] = f"{len(names)} tensors to the reference's number of rows"
