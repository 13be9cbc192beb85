"""F07 index disagrees: metadata and data contradict each other.

What it is: metadata without its storage entry, tensors that overlap, a name that occurs twice, an index that differs
from the headers, stray files beside the shards that other readers would read (a warning).
How it happens: a writer thread died and the save went on (pytorch #191391): `.metadata` then lists a tensor that has
no data. A second save into the same folder leaves files of the first. Shards come from two different saves.
How it shows: a KeyError deep in the loader, or a stale tensor that wins silently: torch's DCP reader for Hugging Face
folders reads every `*.safetensors`, whatever the index says.
What to do: use the checkpoint before it; delete the stray files.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "F07"


def check(case: Case) -> Iterator[Finding]:
    """What reading found."""
    yield from case.told(CODE)
