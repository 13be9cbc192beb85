"""F07 index disagrees: metadata and data contradict each other.

What it means
    The metadata lists a tensor without saying where its data is, two tensors overlap, a name occurs twice, an index
    differs from the files' own headers; or, as a warning, stray files lie beside the shards that other readers would
    read.

How it happens
    A writer thread died and the save went on (pytorch #191391). A second save into the same folder left files of the
    first. Shards come from two different saves.

How it shows
    As a KeyError deep in the loader, or as an outdated tensor that silently wins: PyTorch's DCP reader for Hugging
    Face folders reads every `*.safetensors`, whatever the index says.

What to do
    Use the checkpoint before it, or delete the stray files.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F07"
NEEDS = "a save whose metadata and data agree"


def check(case: Case) -> Iterator[Finding]:
    """Report what reading the checkpoint showed."""
    yield from case.from_reading(CODE)
