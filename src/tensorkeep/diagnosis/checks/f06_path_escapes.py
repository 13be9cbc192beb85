"""F06 path escapes: metadata or a link points outside the checkpoint's folder.

What it means
    A file name in an index or in `.metadata` is absolute or climbs out of the folder with `..`. As a note of `convert`,
    `merge` and `repair`: a small file beside the weights (config, tokenizer) is a link that leads out of the folder. It
    was read and not copied. Links into the blobs of the Hugging Face cache are no such links.

How it happens
    Honest programs do not write such names. It is a way to make a reader open other files of yours. A link is a way to
    make a converter copy one into a checkpoint that you then publish; or you made it yourself, to save space.

How it shows
    Not at all: PyTorch's DCP reader follows such a path without a word.

What to do
    Do not load it. If you made it yourself, write it again from its source. A linked file that belongs to the model:
    copy it into the sink by hand, or name a config with `--config`.
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
