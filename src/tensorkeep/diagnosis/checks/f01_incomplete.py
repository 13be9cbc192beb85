"""F01 incomplete: a save that was interrupted.

What it is: a run's checkpoint folder without its manifest, a DCP folder with data and no `.metadata`, temporary files
that an interrupted write left. A file of another program needs no manifest.
How it happens: the job was killed, or the disk was full, while it saved.
How it shows: DCP fails to open the folder; other loaders take the checkpoint before it without saying so.
What to do: use the checkpoint before it and delete what was left over.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.verification import interrupted
from tensorkeep.findings import Finding

CODE = "F01"


def check(case: Case) -> Iterator[Finding]:
    """What reading found, and temporary files beside the checkpoint."""
    yield from case.told(CODE)
    if "://" not in case.path:
        yield from interrupted(case.path)
