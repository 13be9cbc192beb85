"""F05 file missing: an index or metadata names a file that is not there.

What it means
    The list of files in a sharded checkpoint (`model.safetensors.index.json`, or `.metadata` in a DCP folder) names a
    data file that the folder lacks; or nothing in the folder is recognised as a checkpoint.

How it happens
    A download or a copy was incomplete, or the file of one process stayed on another machine.

How it shows
    As an error that names the file; or, where partial loading is allowed, as a part of the model with its initial
    values.

What to do
    Copy the missing file. Its tensors are nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F05"
NEEDS = "the missing file"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed."""
    yield from case.from_reading(CODE)
