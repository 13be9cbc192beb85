"""S02 vocabulary padded or cut: only the number of rows of embedding and head differs.

What it is: the rows that both sides have are the same; some follow or lack at the end.
How it happens: rows were padded to a multiple of 64 or 128 for speed; tokens were added; a loader took
max(tokenizer, config) (flame does); padding was cut off again.
How it shows: a size mismatch, loud. Forced through, ids beyond the rows crash, and padded rows take probability.
What to do: cut or pad the rows to what the config says; the fix below takes the reference's number. If tokens were
added on purpose, give the matching config beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.expectation import expectation
from tensorkeep.diagnosis.evidence.statistics import relation
from tensorkeep.findings import Finding

CODE = "S02"
SAME = 0.99  # r of the rows in common: rounding and training keep it, another vocabulary has none


def check(case: Case) -> Iterator[Finding]:
    """Embedding and head with more or fewer rows, the common ones alike."""
    wanted = expectation(case)
    if wanted is None:
        return
    names = [
        n
        for n in (hf.EMBEDDING, hf.HEAD)
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
    yield Finding(
        CODE,
        "warning" if meant else "error",
        f"the vocabulary is {word}: {mine} rows, {wanted.by} has {theirs}",
        names,
        {"rows": mine, "expected": theirs, "difference": mine - theirs},
        explains=["S01", "C01", "C02"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}"
        if case.reference is not None
        else None,
    )


def _rows_differ(mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    return len(mine) == len(theirs) == 2 and mine[1] == theirs[1] and mine[0] != theirs[0]


def _common(case: Case, name: str) -> bool:
    mine, theirs = case.pair(name)
    rows = min(len(mine), len(theirs))
    same = np.array_equal(mine[: min(rows, 64)].view(np.uint8), theirs[: min(rows, 64)].view(np.uint8))
    return same or relation(mine[:rows], theirs[:rows]).correlation > SAME
