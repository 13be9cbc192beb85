"""C03 config missing: nothing beside the weights says which model they belong to.

What it is: no config.json in the folder (nor up to two folders above it).
How it happens: only the weights were copied; DCP folders have none by themselves.
How it shows: transformers refuses the folder. RoPE's theta, eps and head sizes stand in no weight: without a config
they can only be guessed.
What to do: copy config.json (and the tokenizer) from the source. With a reference its config is used: an info.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding

CODE = "C03"


def check(case: Case) -> Iterator[Finding]:
    """A model without a config; what other tools assumed for it."""
    yield from case.told(CODE)
    if case.view is None or case.config is not None or not case.tensors or case.read_error is not None:
        return
    if case.reference_config is not None:
        yield Finding(
            CODE,
            "info",
            "no config.json beside the weights; the reference's is used",
            fix=f"cp {_folder(case)}/config.json {case.path}/",
        )
        return
    yield Finding(
        CODE,
        "warning",
        "no config.json beside the weights: RoPE, eps and head sizes are unknown",
        fix="copy config.json from the source",
    )


def _folder(case: Case) -> str:
    return case.reference.path if case.reference is not None else "REFERENCE"
