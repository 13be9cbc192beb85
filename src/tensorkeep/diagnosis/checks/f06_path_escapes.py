"""F06 path escapes: metadata points outside the checkpoint's folder.

What it is: a file name in an index or in `.metadata` is absolute or climbs with `..`.
How it happens: honest writers do not do this; it is a way to make a reader open files of yours.
How it shows: torch's DCP reader follows such a path without a word.
What to do: do not load it. If you made it yourself, write it again from its source.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F06"


def check(case: Case) -> Iterator[Finding]:
    """What reading found."""
    yield from case.told(CODE)
