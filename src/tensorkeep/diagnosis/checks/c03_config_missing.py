"""C03 config missing: nothing beside the weights says which model they belong to.

What it means
    There is no config.json in the folder, nor in the two folders above it.

How it happens
    Only the weights were copied. DCP folders have none by themselves.

How it shows
    transformers refuses the folder. RoPE's theta, eps and the size of a head are in no weight: without a config they
    can only be guessed.

What to do
    Copy config.json (and the tokenizer) from the source. With a reference its config is used, and this is an info.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import word
from tensorkeep.findings import Finding

CODE = "C03"


def check(case: Case) -> Iterator[Finding]:
    """Report a model without a config."""
    yield from case.from_reading(CODE)
    if case.view is None or case.config is not None or not case.tensors or case.read_error is not None:
        return
    if case.reference_config is not None:
        message = "no config.json beside the weights; the reference's is used"
        yield Finding(CODE, "info", message, fix=f"cp {word(_folder(case) + '/config.json')} {word(case.path)}/")
        return
    message = "no config.json beside the weights: RoPE, eps and head sizes are unknown"
    yield Finding(CODE, "warning", message, fix="copy config.json from the source")


def _folder(case: Case) -> str:
    """Return the path of the reference, for the fix."""
    return case.reference.path if case.reference is not None else "REFERENCE"
