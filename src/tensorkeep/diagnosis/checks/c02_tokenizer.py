"""C02 tokenizer does not fit: ids beyond the rows of the embedding, other ids than the reference's, dead rows.

What it is: the tokenizer beside the weights can produce an id that has no row; or it gives known tokens other ids than
the reference's tokenizer does.
How it happens: tokens were added and the embedding was not resized; the tokenizer of a sibling was copied.
How it shows: an index error, or on a GPU an assertion in a kernel; other ids: a loss of 10 and more. Rows that training
never saw have tiny norms and large gradients when they are first used.
What to do: take the tokenizer that was trained with, or resize the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorkeep.conversion.naming import hf
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import parse_json

CODE = "C02"
_TOKENIZER = "tokenizer.json"


def check(case: Case) -> Iterator[Finding]:
    """The ids of tokenizer.json beside the rows of the embedding and beside the reference's ids."""
    if case.view is None:
        return
    embed = case.tensors.get(hf.EMBEDDING)
    if _same_as_reference(case):
        return
    ids = _ids(case.view)
    if not ids or embed is None or len(embed.shape) != 2:
        return
    beyond = {t: i for t, i in ids.items() if i >= embed.shape[0]}
    if beyond and "config:vocab_size" not in case.claims:
        shown = dict(list(beyond.items())[:8])
        yield Finding(
            CODE,
            "error",
            f"{len(beyond)} tokens have ids beyond the {embed.shape[0]} rows of the embedding, the largest {max(beyond.values())}",
            [hf.EMBEDDING],
            {"rows": embed.shape[0], "largest_id": max(ids.values()), "tokens": shown},
            explains=["C01"],
        )
    theirs = _ids(case.reference) if case.reference is not None else {}
    other = {t: (i, theirs[t]) for t, i in ids.items() if t in theirs and theirs[t] != i}
    if other:
        yield Finding(
            CODE,
            "error",
            f"{len(other)} of {len(ids)} tokens have another id than in the reference's tokenizer",
            (),
            {"tokens": {t: {"id": i, "reference": j} for t, (i, j) in list(other.items())[:8]}},
        )
    if case.reference is None and not beyond:
        yield from _dead_rows(case, ids)


def _same_as_reference(case: Case) -> bool:
    """The reference's own tokenizer over as many rows: parsing megabytes of JSON would show nothing new."""
    if case.view is None or case.reference is None:
        return False
    mine, theirs = ({c.name: c.data for c in v.companions}.get(_TOKENIZER) for v in (case.view, case.reference))
    rows = [
        hubs[hf.EMBEDDING].shape if hf.EMBEDDING in hubs else None for hubs in (case.tensors, case.reference_tensors)
    ]
    return mine is not None and mine == theirs and rows[0] == rows[1]


def _dead_rows(case: Case, ids: dict[str, int]) -> Iterator[Finding]:
    """Rows of real tokens that are exactly zero."""
    if hf.EMBEDDING in case.packed or hf.EMBEDDING in case.claims or hf.EMBEDDING in case.broken:
        return
    values = case.values(hf.EMBEDDING)
    used = np.asarray(sorted(set(ids.values())), np.int64)
    dead = int(np.count_nonzero(~np.asarray(values.any(axis=1))[used]))
    if dead:
        yield Finding(
            CODE,
            "warning",
            f"{dead} tokens have a row of zeros in the embedding",
            [hf.EMBEDDING],
            {"dead_rows": dead, "tokens": len(ids)},
        )


def _ids(view: StateView) -> dict[str, int]:
    """Token -> id of tokenizer.json, its added tokens among them; empty where there is none or it says it otherwise."""
    companion = next((c for c in view.companions if c.name == _TOKENIZER), None)
    if companion is None:
        return {}
    try:
        document: Any = parse_json(companion.data, companion.where)
    except TensorkeepError:
        return {}
    model = document.get("model") if isinstance(document, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = list(vocab.items()) if isinstance(vocab, dict) else []
    if isinstance(vocab, list):
        pairs = [(entry[0], i) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry]
    added = document.get("added_tokens") if isinstance(document, dict) else None
    pairs += [(t.get("content"), t.get("id")) for t in added if isinstance(t, dict)] if isinstance(added, list) else []
    return {t: i for t, i in pairs if isinstance(t, str) and type(i) is int}
