"""F02 truncated: a byte range ends beyond its file.

What it is: the header or metadata says that a tensor's bytes lie at a place that the file does not reach.
How it happens: a download or a copy stopped, a disk was full, a job was killed while it wrote.
How it shows: torch's DCP reader notices only for the tensors it asks for; safetensors refuses the file; a `.pth`
fails with a message about the zip's central directory.
What to do: copy or download the file again, or take the checkpoint before it. Nothing can be repaired: the bytes
are not there.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F02"


def check(case: Case) -> Iterator[Finding]:
    """What reading found."""
    yield from case.told(CODE)
