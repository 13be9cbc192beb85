"""Certificates: what a sink holds, by digest, and how it came about (`tensorkeep.json`).

`convert` and `merge` leave one beside the weights; `verify` reads it back. It holds no path and no time, so the same
source gives the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

from tensorkeep.errors import TensorkeepError

SCHEMA = 1


def digest_of_all(digests: dict[str, str]) -> str:
    """One digest for a set of tensors: over the sorted lines `name digest`.

    >>> digest_of_all({"b": "22", "a": "11"}) == digest_of_all({"a": "11", "b": "22"})
    True
    """
    import xxhash

    return xxhash.xxh3_128("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def dump(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def read_certificate(data: bytes, where: object) -> dict[str, Any]:
    """A certificate read back; anything but our schema is an error, not a guess."""
    document = parse_json(data, where)
    tensors = document.get("tensors") if isinstance(document, dict) else None
    if not isinstance(tensors, dict) or document.get("schema") != SCHEMA:
        raise TensorkeepError(
            f"is not a tensorkeep certificate of schema {SCHEMA}",
            where=where,
            code="F03",
            hint="convert the checkpoint again",
        )
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("xxh3_128"), str):
            raise TensorkeepError(f"has no digest for {name!r}", where=where, code="F03")
    return dict(document)


def parse_json(data: bytes, where: object) -> Any:
    """JSON from an untrusted file, with one clear error."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(
            f"is not valid JSON: {error}", where=where, hint="the file is damaged; copy it again"
        ) from None
