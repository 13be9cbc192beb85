"""C02 tokenizer does not fit: ids beyond the rows of the embedding, other ids than the reference's, dead rows.

What it means
    The tokenizer beside the weights can produce an id for which the embedding has no row; or it gives tokens other
    ids than the reference's tokenizer; or, as a warning, the row of a token is all zeros.

How it happens
    Tokens were added and the embedding was not resized, or the tokenizer of a similar model was copied.

How it shows
    As an index error, on a GPU as an assertion in a kernel. Other ids: a loss of 10 and more. Rows that training
    never used get large gradients when they are first used.

What to do
    Take the tokenizer that the model was trained with, or resize the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import parse_json

CODE = "C02"
_TOKENIZER = "tokenizer.json"


def check(case: Case) -> Iterator[Finding]:
    """Compare the ids in tokenizer.json with the rows of the embedding and with the reference's ids."""
    if case.view is None:
        return
    embed = case.tensors.get(case.embedding)
    if _same_as_reference(case):
        return
    ids = _ids(case.view)
    if not ids or embed is None or len(embed.shape) != 2:
        return
    beyond = {t: i for t, i in ids.items() if i >= embed.shape[0]}
    if beyond and "config:vocab_size" not in case.claims:
        shown = dict(list(beyond.items())[:8])
        message = (
            f"{len(beyond)} tokens have ids beyond the {embed.shape[0]} rows of the embedding, the largest "
            f"{max(beyond.values())}"
        )
        evidence = {"rows": embed.shape[0], "largest_id": max(ids.values()), "tokens": shown}
        yield Finding(CODE, "error", message, [case.embedding], evidence, explains=["C01"])
    theirs = _ids(case.reference) if case.reference is not None else {}
    other = {t: (i, theirs[t]) for t, i in ids.items() if t in theirs and theirs[t] != i}
    if other:
        message = f"{len(other)} of {len(ids)} tokens have another id than in the reference's tokenizer"
        evidence = {"tokens": {t: {"id": i, "reference": j} for t, (i, j) in list(other.items())[:8]}}
        yield Finding(CODE, "error", message, (), evidence)
    if case.reference is None and not beyond:
        yield from _dead_rows(case, ids)


def _same_as_reference(case: Case) -> bool:
    """Say whether tokenizer and rows are the reference's: then there is no need to parse megabytes of JSON."""
    if case.view is None or case.reference is None:
        return False
    mine, theirs = ({c.name: c.data for c in v.companions}.get(_TOKENIZER) for v in (case.view, case.reference))
    rows = [
        hubs[case.embedding].shape if case.embedding in hubs else None
        for hubs in (case.tensors, case.reference_tensors)
    ]
    return mine is not None and mine == theirs and rows[0] == rows[1]


def _dead_rows(case: Case, ids: dict[str, int]) -> Iterator[Finding]:
    """Report tokens whose row in the embedding is exactly zero."""
    if case.embedding in case.packed or case.embedding in case.claims or case.embedding in case.broken:
        return
    values = case.values(case.embedding)
    # torch keeps the row of the padding token at zero
    padding = (case.config or {}).get("pad_token_id")
    used = np.asarray(sorted({i for i in ids.values() if i != padding}), np.int64)
    dead = int(np.count_nonzero(~np.asarray(values.any(axis=1))[used]))
    if dead:
        message = f"{dead} tokens have a row of zeros in the embedding"
        yield Finding(CODE, "warning", message, [case.embedding], {"dead_rows": dead, "tokens": len(ids)})


def _ids(view: StateView) -> dict[str, int]:
    """Read the id of each token from tokenizer.json, added tokens included; {} where that is not possible."""
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


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Take the reference's tokenizer."""
    out.companions |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    out.done[CODE] = "took the reference's"
