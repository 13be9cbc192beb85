"""F01 incomplete: a save that was interrupted.

What it means
    The checkpoint was never finished: a run's folder without its manifest, a DCP folder (PyTorch's distributed
    checkpoint) with data and no `.metadata`, or temporary files that an interrupted write left behind. Files of other
    programs need no manifest.

How it happens
    The job was killed, or the disk was full, while it saved.

How it shows
    DCP cannot open the folder. Other loaders silently take the checkpoint before it.

What to do
    Use the checkpoint before it and delete what was left over.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.verification import interrupted
from tensorkeep.findings import Finding

CODE = "F01"
NEEDS = "a complete checkpoint"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed, and temporary files beside it."""
    yield from case.from_reading(CODE)
    if "://" not in case.path:
        yield from interrupted(case.path)
