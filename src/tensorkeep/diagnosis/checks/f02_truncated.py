"""F02 truncated: a byte range ends beyond its file.

What it means
    The header or the metadata says that a tensor's bytes lie at a place that the file does not reach; or a file beside
    the weights that a resume reads (optimizer, schedule, random state, trainer_state.json) was cut or is empty.

How it happens
    A download or a copy stopped, a disk was full, or a job was killed while it wrote.

How it shows
    safetensors refuses the file. PyTorch's DCP reader notices only for the tensors it is asked for. A `.pth` file
    fails with a message about the central directory of a zip.

What to do
    Copy or download the file again, or take an earlier checkpoint. Nothing can be repaired: the bytes are not there.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_files import damaged_files
from tensorkeep.findings import Finding

CODE = "F02"
NEEDS = "the whole file: its end is missing"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed, and files of a resume that were cut (F07: that hold nothing of it)."""
    yield from case.from_reading(CODE)
    if case.view is not None:
        yield from damaged_files(case.view, whole=False)
