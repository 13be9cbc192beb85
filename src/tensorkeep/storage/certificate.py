"""Certificates (`tensorkeep.json`): the digests of what was written, and how it came about.

`convert` and `merge` leave one beside the weights; `verify` reads it back. It holds no path and no time, so the same
source gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage.budget import check_json

SCHEMA = 1


def digest_of_all(digests: dict[str, str]) -> str:
    """Combine the digests of a set of tensors into one, whatever their order.

    Args:
        digests: tensor name -> xxh3_128 of its bytes, in hex.

    Returns:
        xxh3_128 over the sorted lines `name digest`, in hex.

    Example:
        >>> digest_of_all({"b": "22", "a": "11"}) == digest_of_all({"a": "11", "b": "22"})
        True
    """
    import xxhash

    return xxhash.xxh3_128("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def dump(document: dict[str, Any]) -> bytes:
    r"""Return a document as JSON: indented, as UTF-8 bytes with a newline at the end.

    Args:
        document: anything that JSON can hold; keys stay in their order.

    Example:
        >>> dump({"schema": 1})
        b'{\n "schema": 1\n}\n'
    """
    return (indented(document) + "\n").encode("utf-8", "surrogatepass")


_plain = json.JSONEncoder(ensure_ascii=False).encode  # what is no dict and no list


def indented(value: Any, line: str = "\n", quoted: Callable[[str], str] = encode_basestring) -> str:
    """Spell a value as `json.dumps(value, indent=1)` does, in half its time.

    Args:
        value: anything that JSON can hold; keys stay in their order.
        line: what begins a line of its depth.
        quoted: spells a text; `encode_basestring_ascii` does what `ensure_ascii` asks for.

    Returns:
        The text, without a newline at its end.
    """
    if isinstance(value, str):
        return quoted(value)
    below = f"{line} "
    if isinstance(value, dict) and value:
        if not all(isinstance(name, str) for name in value):
            value = {name if isinstance(name, str) else _plain({name: 0})[2:-5]: item for name, item in value.items()}
        inner = [f"{quoted(name)}: {indented(item, below, quoted)}" for name, item in value.items()]
        return f"{{{below}{f',{below}'.join(inner)}{line}}}"
    if isinstance(value, (list, tuple)) and value:
        return f"[{below}{f',{below}'.join([indented(item, below, quoted) for item in value])}{line}]"
    return str(value) if type(value) is int else _plain(value)


def parse_certificate(data: bytes, where: object) -> dict[str, Any]:
    """Read a certificate's bytes and check that it is one of this schema.

    Args:
        data: the file's bytes.
        where: the file, for messages.

    Returns:
        The document; `document["tensors"]` maps names to entries with an "xxh3_128".

    Raises:
        TensorkeepError: F03 where it is another schema or lacks a digest.
    """
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
    """Parse JSON from an untrusted file.

    Args:
        data: the file's bytes, UTF-8.
        where: the file, for messages.

    Returns:
        The value: dicts, lists, texts, numbers, booleans, None.

    Raises:
        TensorkeepError: it is not valid JSON, nested too deeply to be read, names a member twice, or holds
            more values than a file of its size may.
    """
    check_json(data, where)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(
            f"is not valid JSON: {error}", where=where, hint="the file is damaged; copy it again"
        ) from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of a JSON object's members, of which no two may have one name: readers differ in which they take.

    Args:
        pairs: names and values, as `json.loads(..., object_pairs_hook=unique)` gives them.

    Raises:
        ValueError: a name occurs twice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {shown(twice)} occurs twice")
    return made
