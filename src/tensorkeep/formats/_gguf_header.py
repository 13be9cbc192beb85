"""Read the header of a GGUF file: metadata and tensor infos, every count and offset checked before it is used.

The header is parsed here and not by gguf.GGUFReader because that one maps a local file, believes every count it reads
(a hostile one loops for hours) and takes seconds for a vocabulary; the gguf package gives the types, their block
sizes and the decoding. Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Folder, short_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LARGEST_HEADER = 256 << 20  # bytes; the largest vocabularies known take some 15 MB
FIRST_READ = 1 << 20  # bytes to begin with; doubled as the header goes on
_MOST_ENTRIES = 1 << 17  # metadata keys, and tensors
_MOST_ELEMENTS = 1 << 23  # of all arrays together
_MOST_DIMS = 4  # ggml's own limit
DAMAGED = "the header is damaged; download the file again"
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class TensorInfo(NamedTuple):
    """One tensor as the header describes it.

    Attributes:
        name: its name in llama.cpp's spelling.
        shape: its sizes in row-major order, ggml's `ne` reversed.
        kind: number of its ggml type.
        offset: first byte, counted from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """What stands before the tensors' data.

    Attributes:
        metadata: key -> value.
        tensors: the tensors in the order of the header.
        start: byte of the file that tensor offsets count from.
        alignment: tensor offsets are multiples of this, in bytes.
    """

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    start: int
    alignment: int


class Cursor:
    """A position in a header that moves on as values are read; the file is fetched in growing pieces, never mapped."""

    def __init__(self, folder: Folder, file: str) -> None:
        self.folder, self.file = folder, file
        self.where = f"{folder.url}/{file}"
        self.size = folder.size(file)
        self.at = 0
        self.elements = 0
        self._data = b""

    def wrong(self, what: str) -> TensorkeepError:
        """Make the error for a header that contradicts itself (F07)."""
        return TensorkeepError(what, where=self.where, code="F07", hint=DAMAGED)

    def need(self, count: int) -> int:
        """Get the next `count` bytes into memory and return where they begin; F02 beyond the file's end."""
        start, end = self.at, self.at + count
        if end > self.size:
            raise short_file(self.where, start, count, self.size)
        if end > _LARGEST_HEADER:
            raise self.wrong(f"the header is larger than {_LARGEST_HEADER >> 20} MiB")
        if end > len(self._data):
            grown = min(max(end, 2 * len(self._data), FIRST_READ), self.size)
            self._data += self.folder.read(self.file, len(self._data), grown - len(self._data))
        self.at = end
        return start

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """Read `count` little-endian numbers of one struct letter."""
        text = f"<{count}{form}"
        start = self.need(struct.calcsize(text))  # first: it may replace the buffer
        return struct.unpack_from(text, self._data, start)

    def string(self, strict: bool = False) -> str:
        """Read a string; broken UTF-8, which vocabularies have, is kept as surrogates, or refused (`strict`)."""
        start = self.need(8)
        (length,) = _LENGTH.unpack_from(self._data, start)  # precompiled: a vocabulary has 10^5 strings
        start = self.need(length)
        try:
            return self._data[start : start + length].decode("utf-8", "strict" if strict else "surrogateescape")
        except UnicodeDecodeError:
            raise self.wrong(f"the name at byte {start} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """Read one metadata value of a GGUF value type: a number, a bool, a string, or a list of these."""
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.wrong(f"{key} has the unknown value type {kind}")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        width = struct.calcsize(f"<{SCALARS[kind]}") if kind in SCALARS else 8
        if kind not in SCALARS and kind != _STRING:
            raise self.wrong(f"{key} is an array of the value type {kind}")
        if self.at + count * width > self.size:  # before anything is allocated for it
            raise short_file(self.where, self.at, count * width, self.size)
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise self.wrong(f"{key}: the arrays hold more than {_MOST_ELEMENTS} elements")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers(SCALARS[kind], count))


def read_gguf_header(folder: Folder, file: str) -> Header:
    """Parse the header of one GGUF file.

    Args:
        folder: where the file lies.
        file: its name.

    Raises:
        TensorkeepError: F02 where it is truncated, F07 where it contradicts itself or is another version.

    Example:
        >>> read_gguf_header(folder, "model.gguf").metadata["general.architecture"]   # doctest: +SKIP
        'llama'
    """
    cursor = Cursor(folder, file)
    start = cursor.need(4)
    if cursor._data[start : start + 4] != MAGIC:
        raise cursor.wrong("does not begin with GGUF")
    (version,) = cursor.numbers("I")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        raise TensorkeepError(
            "is a big-endian GGUF" if big else f"is GGUF version {version}; versions 2 and 3 are read",
            where=cursor.where,
            code="F07",
            hint="convert it to little-endian with gguf's own gguf-convert-endian"
            if big
            else "convert the model again with a current llama.cpp",
        )
    tensors, keys = cursor.numbers("Q", 2)
    if max(tensors, keys) > _MOST_ENTRIES:
        raise cursor.wrong(f"{tensors} tensors and {keys} metadata keys are announced")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string(strict=True)
        if key in metadata:
            raise cursor.wrong(f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.numbers("I")[0], key)
    infos = [_info(cursor) for _ in range(tensors)]
    names = {info.name for info in infos}
    if len(names) != len(infos):
        raise cursor.wrong(f"{len(infos) - len(names)} tensor names occur twice")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment is {alignment!r}")
    return Header(metadata, infos, -(-cursor.at // alignment) * alignment, alignment)


def _info(cursor: Cursor) -> TensorInfo:
    """Read one tensor's entry."""
    name = cursor.string(strict=True)
    (dims,) = cursor.numbers("I")
    if dims > _MOST_DIMS:
        raise cursor.wrong(f"{name}: {dims} dimensions, ggml has at most {_MOST_DIMS}")
    shape = tuple(reversed(cursor.numbers("Q", dims)))
    if math.prod(max(n, 1) for n in shape) >= 1 << 48:
        raise cursor.wrong(f"{name}: shape {list(shape)}")
    (kind,), (offset,) = cursor.numbers("I"), cursor.numbers("Q")
    return TensorInfo(name, shape, kind, offset)
