"""F04 unsafe pickle: loading it would run code outside the allow-list; the names are given.

What it means
    `.pth` files and the `.metadata` of DCP folders are pickles, and a pickle may call any function while it is
    loaded. tensorkeep reads pickles as data and calls nothing. This one asks for functions that run commands or change
    files. As an info: it holds objects of classes that are not known here (a config, an enum); the tensors are read,
    and those objects stay opaque.

How it happens
    Somebody pickled a function together with the tensors, or somebody means harm. Objects that stay opaque are
    training scripts' own settings, saved beside the weights.

How it shows
    `torch.load` with `weights_only=True` refuses it. PyTorch's DCP reader does not: it would run the code.

What to do
    If you trust its maker, load it in a sandbox with the program that wrote it, and save the tensors alone. Otherwise
    delete it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_files import opaque_objects
from tensorkeep.findings import Finding

CODE = "F04"
NEEDS = "a file without code in it"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed."""
    yield from case.from_reading(CODE)
    if case.view is not None:
        yield from opaque_objects(case.view)
