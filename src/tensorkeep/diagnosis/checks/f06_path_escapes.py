"""F06 path escapes: metadata points outside the checkpoint's folder.

What it means
    A file name in an index or in `.metadata` is absolute or climbs out of the folder with `..`.

How it happens
    Honest programs do not write such names. It is a way to make a reader open other files of yours.

How it shows
    Not at all: PyTorch's DCP reader follows such a path without a word.

What to do
    Do not load it. If you made it yourself, write it again from its source.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F06"
NEEDS = "a checkpoint written by an honest program"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed."""
    yield from case.from_reading(CODE)
