"""The token cache: every document is tokenized once and mapped from the disk afterwards.

A cache is a folder named by its fingerprint: xxh3 over the bytes of the sources, the tokenizer and the settings. Other
data gives another folder, so a stale one is never used; a damaged one is found by its digests and made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import replacing, write_bytes

INDEX, TOKENS, MARKS, OFFSETS = "cache.json", "tokens.bin", "marks.bin", "offsets.bin"
SCHEMA = 1


class Encoded(NamedTuple):
    """A tokenized document: its ids, and which of them the loss counts (None: all)."""

    ids: Sequence[int]
    marks: Sequence[bool] | None = None


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many documents, one after another, mapped from the disk.

    Args:
        ids: uint16 or uint32 `[tokens]`.
        marks: uint8 `[tokens]`, 1 where the loss counts a token (None: it counts all).
        offsets: document d is `ids[offsets[d] : offsets[d + 1]]`, uint64 `[documents + 1]`.
        fingerprint: hex digest of the sources and settings.
    """

    ids: np.ndarray[Any, Any]
    marks: np.ndarray[Any, Any] | None
    offsets: np.ndarray[Any, Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """How many tokens each document has, int64 `[documents]`."""
        return np.diff(self.offsets.astype(np.int64))


def fingerprint(files: Sequence[str | Path], settings: Mapping[str, Any]) -> str:
    """Digest the settings and the bytes of the files in their order: xxh3_128 as hex."""
    state = xxhash.xxh3_128(json.dumps({"schema": SCHEMA, **settings}, sort_keys=True, default=str).encode())
    for path in map(Path, files):
        with explained(path), path.open("rb") as file:
            size = 0
            while piece := file.read(8 << 20):
                state.update(piece)
                size += len(piece)
        state.update(size.to_bytes(8, "little"))  # where one file ends and the next begins
    return state.hexdigest()


def cached(
    folder: Path,
    digest: str,
    encode: Callable[[], Iterable[Encoded]],
    vocabulary: int,
    remark: Callable[[str], None] = lambda _: None,
    empty: bool = False,
) -> Tokens:
    """Open the cache `folder/digest`, or make it where it is not there or damaged.

    Args:
        folder: holds one folder a cache.
        digest: the fingerprint of sources and settings.
        encode: gives the documents, tokenized.
        vocabulary: number of ids; up to 65,536 are stored in two bytes each.
        remark: is told when a damaged cache is made again.
        empty: whether a cache without a document may be.

    Raises:
        TensorkeepError: `encode` gives nothing at all, or an id beyond the vocabulary (C02).
    """
    place = Path(folder) / digest
    if place.is_dir():
        try:
            return opened(place, digest)
        except TensorkeepError as error:
            remark(f"warning: the token cache is made again: {error.line}")
    with explained(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(place, overwrite=True) as temporary:
        with explained(temporary):
            temporary.mkdir()
            _write(temporary, digest, encode(), vocabulary, empty)
        opened(temporary, digest)
    return opened(place, digest, proven=True)


def _write(folder: Path, digest: str, documents: Iterable[Encoded], vocabulary: int, empty: bool = False) -> None:
    """Stream the documents into a cache's files; the index comes last."""
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    offsets = [0]
    sums = {name: xxhash.xxh3_128() for name in (TOKENS, MARKS, OFFSETS)}
    marked = False
    with (folder / TOKENS).open("xb") as tokens, (folder / MARKS).open("xb") as marks:
        for ids, counted in documents:
            if len(ids) == 0:
                continue
            made = np.asarray(ids, np.int64)
            if int(made.min()) < 0 or int(made.max()) >= vocabulary:
                raise TensorkeepError(
                    f"the tokenizer gave id {int(made.max())}, the model has {vocabulary} rows",
                    where="tokenizer",
                    code="C02",
                    hint="take the tokenizer that belongs to the model",
                )
            offsets.append(offsets[-1] + len(made))
            _append(tokens, sums[TOKENS], made.astype(dtype).tobytes())
            if counted is not None:
                marked = True
                _append(marks, sums[MARKS], np.asarray(counted, np.uint8).tobytes())
    if len(offsets) == 1 and not empty:
        raise TensorkeepError("the data is empty", where="data.files", hint="no document has a token that counts")
    data = np.asarray(offsets, "<u8").tobytes()
    sums[OFFSETS].update(data)
    write_bytes(folder / OFFSETS, data)
    if not marked:
        (folder / MARKS).unlink()
    names = [TOKENS, OFFSETS, *([MARKS] if marked else [])]
    index = {
        "schema": SCHEMA,
        "fingerprint": digest,
        "dtype": dtype.str,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "files": {n: {"bytes": (folder / n).stat().st_size, "xxh3_128": sums[n].hexdigest()} for n in names},
    }
    write_bytes(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _append(file: Any, state: Any, data: bytes) -> None:
    """Write bytes, and digest them on the way."""
    file.write(data)
    state.update(data)


def opened(folder: Path, digest: str, proven: bool = False) -> Tokens:
    """Map a cache, after comparing every byte with its digest.

    Args:
        folder: the cache.
        digest: the fingerprint it must have.
        proven: leave the comparison out, since it was just made.

    Raises:
        TensorkeepError: the index is missing (F05), a file is truncated (F02) or damaged, or the cache is another's
            (F03).
    """
    index = parse_json(read_small(folder / INDEX), folder / INDEX)
    try:
        dtype, documents, total = np.dtype(index["dtype"]), int(index["documents"]), int(index["tokens"])
        files = {str(n): (int(entry["bytes"]), str(entry["xxh3_128"])) for n, entry in index["files"].items()}
        whole = index["fingerprint"] == digest and dtype.str in ("<u2", "<u4") and {TOKENS, OFFSETS} <= files.keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole or not files.keys() <= {TOKENS, MARKS, OFFSETS}:
        raise TensorkeepError("is no index of this cache", where=folder / INDEX, code="F03")
    sizes = {TOKENS: total * dtype.itemsize, MARKS: total, OFFSETS: 8 * (documents + 1)}
    for name, (size, expected) in files.items():
        path = folder / name
        with explained(path):
            if path.stat().st_size != size or size != sizes[name]:
                raise TensorkeepError(
                    f"has {path.stat().st_size} bytes instead of {sizes[name]}", where=path, code="F02"
                )
            if not proven and _digest(path) != expected:
                raise TensorkeepError("is damaged", where=path, code="F03")
    with explained(folder):
        if not total:  # nothing to map
            return Tokens(np.empty(0, dtype), None, np.zeros(1, "<u8"), digest)
        ids = np.memmap(folder / TOKENS, dtype, "r")
        marks = np.memmap(folder / MARKS, np.uint8, "r") if MARKS in files else None
        return Tokens(ids, marks, np.memmap(folder / OFFSETS, "<u8", "r"), digest)


def _digest(path: Path) -> str:
    """xxh3_128 of a file, as hex."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            state.update(piece)
    return state.hexdigest()


def in_batches(texts: Iterable[str], size: int = 512) -> Iterator[list[str]]:
    """Group texts into lists of `size`, since a fast tokenizer works on many at once."""
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
