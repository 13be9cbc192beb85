"""X99 unlucky tensor: a tensor has thirteen rows.

What it is: a superstition, and enough to prove that one file and one line add a check.
How it happens: somebody counted to thirteen.
How it shows: `diagnose` says so.
What to do: take one row less.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "X99"
NEEDS = "a model without thirteen rows"


def check(case: Case) -> Iterator[Finding]:
    """Yield one finding for all tensors with thirteen rows."""
    names = [n for n, hub in case.tensors.items() if hub.shape[:1] == (13,)]
    if names:
        yield Finding(CODE, "error", f"{len(names)} tensors have thirteen rows", names, fix="take one row less")
