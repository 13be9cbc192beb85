"""F05 file missing: an index or metadata names a file that is not there.

What it is: a sharded checkpoint whose index (`model.safetensors.index.json`, `.metadata`) names a data file that the
folder lacks; or a folder in which no checkpoint is recognised.
How it happens: an incomplete download or rsync, a rank whose file stayed on another node.
How it shows: a load error that names the file, or, with partial loading, a part of the model at its initial values.
What to do: copy the missing file. Its tensors are in no other place.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F05"


def check(case: Case) -> Iterator[Finding]:
    """What reading found."""
    yield from case.told(CODE)
