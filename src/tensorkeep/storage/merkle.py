"""Merkle trees over a model's tensors: leaves, roots and proofs that one leaf is among them, as RFC 6962 has them.

Every hash is SHA-256 over one byte that says what is hashed, so that no inner node can pass for a leaf, no chunk for a
tensor and no tree for a model. The whole form is written down in docs/reference/identity.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

CHUNK = 16 << 20  # bytes of a tensor that one leaf of its own tree covers
SIZE = 32  # bytes of a hash
_LEAF, _NODE, _CHUNK, _CHUNK_NODE, _MODEL = (bytes([n]) for n in range(5))
_DOMAIN = b"tensorkeep identity 1"


def chunk_hasher() -> hashlib._Hash:
    """Return a running hash for the bytes of one chunk of a tensor."""
    return hashlib.sha256(_CHUNK)


def content_hash(chunks: Sequence[bytes]) -> bytes:
    """Return the hash of a tensor's bytes from those of its chunks.

    Args:
        chunks: hashes of its chunks of 16 MiB, in order; none for a tensor without elements.
    """
    return _root(chunks, _CHUNK_NODE)


def tensor_leaf(name: str, dtype: str, shape: Sequence[int], content: bytes) -> bytes:
    """Return the leaf of one tensor.

    Args:
        name: its hf name.
        dtype: as safetensors spells it.
        shape: its sizes.
        content: from `content_hash`.
    """
    sides = b"".join(int(side).to_bytes(8, "little") for side in shape)
    return _leaf(b"tensor", name.encode("utf-8"), dtype.encode("ascii"), sides, content)


def part_leaf(kind: str, data: bytes) -> bytes:
    """Return the leaf of what lies beside the weights: a config, a tokenizer, a chat template.

    Args:
        kind: "config", "tokenizer", ...
        data: its canonical bytes.
    """
    return _leaf(b"part", kind.encode("ascii"), data)


def identity(leaves: Sequence[bytes]) -> bytes:
    """Return a model's identity.

    Args:
        leaves: those of its tensors, in the order of their names' UTF-8 bytes.
    """
    return _identity(len(leaves), _root(leaves, _NODE))


def path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return the hashes that lead from one leaf to the root, nearest first.

    Args:
        leaves: all of the tree.
        index: of the leaf.
    """
    if len(leaves) <= 1:
        return []
    cut = _cut(len(leaves))
    if index < cut:
        return [*path(leaves[:cut], index), _root(leaves[cut:], _NODE)]
    return [*path(leaves[cut:], index - cut), _root(leaves[:cut], _NODE)]


def identity_by(leaf: bytes, index: int, count: int, hashes: Sequence[bytes]) -> bytes | None:
    """Return the identity that a leaf and the hashes from `path` lead to.

    Args:
        leaf: of the tensor.
        index: of the leaf.
        count: number of leaves.
        hashes: from `path`.

    Returns:
        The identity; None where there are more or fewer hashes than a tree of that size asks for.
    """
    if not 0 <= index < count or len(hashes) != len(turns := _turns(index, count)):
        return None
    for left, other in zip(turns, hashes):
        leaf = _node(_NODE, other, leaf) if left else _node(_NODE, leaf, other)
    return _identity(count, leaf)


def _turns(index: int, count: int) -> list[bool]:
    """Return, from a leaf up, whether the other side of each node stands to the left."""
    turns: list[bool] = []
    while count > 1:
        cut = _cut(count)
        turns.append(index >= cut)
        index, count = (index - cut, count - cut) if index >= cut else (index, cut)
    return turns[::-1]


def _cut(count: int) -> int:
    """Return the largest power of two below a number above 1."""
    return 1 << ((count - 1).bit_length() - 1)


def _root(hashes: Sequence[bytes], kind: bytes) -> bytes:
    """Return the root of a tree as RFC 6962 shapes it: the left side holds the largest power of two below the whole."""
    if not hashes:
        return hashlib.sha256().digest()
    level = list(hashes)
    while len(level) > 1:  # pairs from the left, a last one alone goes up as it is: the same shape
        paired = [_node(kind, a, b) for a, b in zip(level[::2], level[1::2])]
        level = paired + level[len(level) // 2 * 2 :]
    return level[0]


def _node(kind: bytes, left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(kind + left + right).digest()


def _identity(count: int, root: bytes) -> bytes:
    return hashlib.sha256(_MODEL + _fields((_DOMAIN, count.to_bytes(8, "little"), root))).digest()


def _leaf(*fields: bytes) -> bytes:
    return hashlib.sha256(_LEAF + _fields(fields)).digest()


def _fields(fields: Iterable[bytes]) -> bytes:
    """Return fields, each behind its length in 8 bytes: no two lists of fields give the same bytes."""
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)
