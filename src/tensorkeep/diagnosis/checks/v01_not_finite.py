"""V01 NaN or Inf: values that are no numbers.

What it means
    Elements are NaN or infinite where the reference's are finite.

How it happens
    Training diverged and saved; a cast to fp16 overflowed (beyond 65,504) or to fp8 e4m3 (beyond 448); memory was
    never written; a bit of an exponent flipped.

How it shows
    The loss is NaN, at once or at the first input that reaches the element.

What to do
    Take an earlier checkpoint. With `--take-from-reference NAME`, `tensorkeep repair` takes the lost elements from the
    reference, and leaves every other one as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence.adapters import checkpoint_adapter
from tensorkeep.diagnosis.evidence.case import Case, np_dtype_known
from tensorkeep.diagnosis.evidence.remedy import Remedies, heal
from tensorkeep.diagnosis.evidence.scan import not_finite, scan
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "V01"


def check(case: Case) -> Iterator[Finding]:
    """Report tensors with NaN or infinities that the reference does not have, and an adapter's."""
    yield from _of_adapter(case)
    counts: dict[str, tuple[int, int]] = {}
    if case.reference is not None:
        for name in case.differing():
            nan, infinite = not_finite(case.values(name))
            if (nan or infinite) and (nan, infinite) != not_finite(case.pair(name)[1]):
                counts[name] = nan, infinite
    else:
        counts = {
            n: (s.nan, s.infinite) for n, s in scan(case).items() if (s.nan or s.infinite) and n not in case.claims
        }
    if not counts:
        return
    case.claim(counts, CODE)
    nan, infinite = (sum(c[i] for c in counts.values()) for i in (0, 1))
    elements = sum(int(np.prod(case.tensors[n].shape)) for n in counts)
    message = f"{nan} NaN and {infinite} infinite values in {len(counts)} tensors"
    evidence = {
        "nan": nan,
        "infinite": infinite,
        "of": elements,
        "tensors": {n: {"nan": c[0], "infinite": c[1]} for n, c in list(counts.items())[:32]},
    }
    yield Finding(
        CODE, "error", message, list(counts), evidence, explains=["V06", "V07"], fix=case.repair_command(counts)
    )


def _of_adapter(case: Case) -> Iterator[Finding]:
    """Report an adapter's own tensors, which no model has: nothing can be taken from a reference."""
    adapter = checkpoint_adapter(case)
    if adapter is None:
        return
    parts = [n for pair in (*adapter.pairs.values(), *adapter.embeddings.values()) for n in pair]
    names = dict.fromkeys(adapter.view if adapter.view.format == "peft" else parts)
    floats = [n for n in names if DTYPES[adapter.view[n].dtype].floating and np_dtype_known(adapter.view[n].dtype)]
    bad = {n: counts for n in floats if any(counts := not_finite(adapter.view.array(n)))}
    if bad:
        nan, infinite = (sum(c[i] for c in bad.values()) for i in (0, 1))
        message = f"{nan} NaN and {infinite} infinite values in {len(bad)} tensors of the adapter: {next(iter(bad))}"
        yield Finding(CODE, "error", message, evidence={"nan": nan, "infinite": infinite, "tensors": sorted(bad)[:32]})


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Take the damaged elements from the reference."""
    heal(case, names, out, CODE)
