"""The entries of a manifest: files, whole tensors, and the shards of tensors, which lists beside the files hold.

A shard is a rectangle of a tensor in a torch.save archive of its own. Its bytes are digested in up to twelve pieces of
whole rows, so that 2, 3, 4 or 6 times as many ranks read and compare just their own rows; what stands around them in
the archive has a digest of its own, so that damage there has a name as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import xxhash

from tensorkeep.storage.record import DTYPES, checked_shape, nbytes

MOST_PIECES, SMALLEST_PIECE = 12, 256 << 10  # twelve: divides by 2, 3, 4 and 6
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
_READ = 4 << 20  # bytes at a time


class FileEntry(NamedTuple):
    """A file of the checkpoint.

    Attributes:
        size: its size in bytes.
        chunks: xxh3_128 of every 16 MiB of it, in hex.
    """

    size: int
    chunks: list[str]


class TensorEntry(NamedTuple):
    """A tensor in a file.

    Attributes:
        dtype: its dtype as safetensors spells it.
        shape: its sizes.
        start: its first byte in the file.
        digest: xxh3_128 of its raw bytes, in hex.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return nbytes(self.dtype, self.shape)


class ShardEntry(NamedTuple):
    """A rectangle of a tensor in a file, or an object that is no tensor (`U8` of one dimension, without an archive).

    Attributes:
        tensor: the tensor's name.
        dtype: its dtype as safetensors spells it.
        shape: sizes of the rectangle.
        offset: index of its first element in the whole tensor; None for an object that is no tensor.
        start: first byte of its data in the file.
        pieces: xxh3_128 of its data in pieces of whole rows, as `row_pieces` cuts them, in hex.
        archive: first byte and bytes of the archive around it; its own where there is none.
        frame: xxh3_128 of the archive without the data, in hex.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...] | None
    start: int
    pieces: tuple[str, ...]
    archive: tuple[int, int]
    frame: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return nbytes(self.dtype, self.shape)

    def document(self) -> dict[str, Any]:
        """Return the entry as the list writes it."""
        return {
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": None if self.offset is None else list(self.offset),
            "start": self.start,
            "xxh3_128": list(self.pieces),
            "archive": list(self.archive),
            "frame": self.frame,
        }


def row_pieces(dtype: str, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Cut a rectangle's data into the pieces that have digests of their own.

    Args:
        dtype: as safetensors spells it.
        shape: sizes of the rectangle.

    Returns:
        First row and rows of each piece, in order; a scalar is one row. One piece at least.

    Example:
        >>> row_pieces("F32", (4, 131072)), row_pieces("F32", (8,))
        ([(0, 1), (1, 1), (2, 1), (3, 1)], [(0, 8)])
    """
    rows = shape[0] if shape else 1
    count = max(1, min(MOST_PIECES, nbytes(dtype, tuple(shape)) // SMALLEST_PIECE, rows))
    edges = [rows * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]


# -- from an untrusted manifest ---------------------------------------------------------------------------------------


def digests_in(value: Any) -> list[str] | None:
    """Return a list of digests; None where it is anything else.

    Args:
        value: what the manifest holds.
    """
    good = isinstance(value, list) and all(isinstance(d, str) and _DIGEST.match(d) for d in value)
    return value if good else None


def tensor_entry(entry: Any, size: int) -> TensorEntry | None:
    """Check one tensor's entry; it must lie within its file of `size` bytes. None where it cannot be."""
    kind = _kind(entry)
    digest = digests_in([entry.get("xxh3_128")]) if kind is not None else None
    if kind is None or digest is None or kind[2] + nbytes(*kind[:2]) > size:
        return None
    return TensorEntry(*kind, digest[0])


def list_name(file: str) -> str:
    """Return the name of the list that says what lies in a rank's file.

    Args:
        file: the file's name.

    Example:
        >>> list_name("__3_0.distcp")
        '__3_0.shards.json'
    """
    return f"{file.rpartition('.')[0]}.shards.json"


def list_bytes(shards: Sequence[ShardEntry]) -> bytes:
    """Write the list of the shards in a file.

    Args:
        shards: in the order of the file.

    Returns:
        The list as JSON, a line a shard.
    """
    entries = ",\n ".join(json.dumps(shard.document(), separators=(",", ":")) for shard in shards)
    return f'{{"schema": 1, "shards": [\n {entries}\n]}}\n'.encode()


def shard_list(document: Any, size: int) -> list[ShardEntry] | None:
    """Check the list of the shards in a file of `size` bytes; None where it cannot be.

    Args:
        document: what the list holds.
        size: bytes of the file.
    """
    entries = document.get("shards") if isinstance(document, dict) and document.get("schema") == 1 else None
    found = [shard_entry(entry, size) for entry in entries] if isinstance(entries, list) else [None]
    return None if None in found else [shard for shard in found if shard is not None]


def shard_entry(entry: Any, size: int) -> ShardEntry | None:
    """Check one shard's entry; archive and data must lie within the file of `size` bytes. None where it cannot be."""
    kind = _kind(entry)
    if kind is None:
        return None
    dtype, shape, start = kind
    name, frame, pieces = entry.get("tensor"), entry.get("frame"), digests_in(entry.get("xxh3_128"))
    offset, archive = entry.get("offset"), entry.get("archive")
    where = None if offset is None else checked_shape(offset)
    around = isinstance(archive, list) and len(archive) == 2 and all(type(n) is int and n >= 0 for n in archive)
    if (
        not isinstance(name, str)
        or digests_in([frame]) is None
        or pieces is None
        or len(pieces) != len(row_pieces(dtype, shape))
        or (offset is not None and (where is None or len(where) != len(shape)))
        or not around
        or not archive[0] <= start
        or not start + nbytes(dtype, shape) <= sum(archive) <= size
    ):
        return None
    return ShardEntry(name, dtype, shape, where, start, tuple(pieces), (archive[0], archive[1]), frame)


def _kind(entry: Any) -> tuple[str, tuple[int, ...], int] | None:
    """Dtype, shape and first byte of an entry; None where they cannot be."""
    if not isinstance(entry, dict):
        return None
    dtype, start, shape = entry.get("dtype"), entry.get("start"), checked_shape(entry.get("shape"))
    if not isinstance(dtype, str) or dtype not in DTYPES or shape is None or type(start) is not int or start < 0:
        return None
    return dtype, shape, start


# -- which one is damaged? --------------------------------------------------------------------------------------------


def damaged_tensors(
    file: BinaryIO,
    tensors: Mapping[str, TensorEntry],
    shards: Sequence[ShardEntry],
    wrong: Sequence[int],
    chunk: int,
) -> list[str]:
    """Name the tensors in the damaged chunks of a file whose own digests differ.

    Args:
        file: the open file.
        tensors: the whole tensors in it, by name.
        shards: the shards in it.
        wrong: the numbers of the damaged chunks.
        chunk: bytes of a chunk.

    Returns:
        Names without repetition, in the order of the manifest.
    """
    bad, found = set(wrong), dict[str, None]()

    def touched(start: int, length: int) -> bool:
        return bool(length) and not bad.isdisjoint(range(start // chunk, (start + length - 1) // chunk + 1))

    for name, tensor in tensors.items():
        if touched(tensor.start, tensor.nbytes) and _digest(file, [(tensor.start, tensor.nbytes)]) != tensor.digest:
            found[name] = None
    for shard in shards:
        if shard.tensor not in found and touched(*shard.archive) and not _whole(file, shard):
            found[shard.tensor] = None
    return list(found)


def _whole(file: BinaryIO, shard: ShardEntry) -> bool:
    """Tell whether a shard and the archive around it are what was written."""
    end, behind = shard.start + shard.nbytes, sum(shard.archive)
    if _digest(file, [(shard.archive[0], shard.start - shard.archive[0]), (end, behind - end)]) != shard.frame:
        return False
    row = nbytes(shard.dtype, shard.shape[1:]) if shard.shape else shard.nbytes
    places = [(shard.start + first * row, rows * row) for first, rows in row_pieces(shard.dtype, shard.shape)]
    return all(_digest(file, [place]) == digest for place, digest in zip(places, shard.pieces))


def _digest(file: BinaryIO, places: Sequence[tuple[int, int]]) -> str:
    """Return the xxh3_128 of some ranges of a file, one after another; of less where the file ends before."""
    running = xxhash.xxh3_128()
    for start, left in places:
        file.seek(start)
        while left and (piece := file.read(min(left, _READ))):
            running.update(piece)
            left -= len(piece)
    return running.hexdigest()
