"""Lay out torch.save archives: zips whose every byte has its position before the first one is written."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.archive import STORAGE_OF
from tensorkeep.storage.layout import Fixed, SinkTensor, Slot, Trailer
from tensorkeep.storage.pickle_values import Global, Object, Persistent
from tensorkeep.storage.pickle_writing import emit
from tensorkeep.storage.record import DTYPES, FROM_TORCH, row_major

ALIGNMENT = 64  # torch.load(mmap=True) and direct I/O like it; torch.save writes the same


class ArchiveBuilder:
    """Collects the segments of one archive, beginning at byte `start` of its file.

    Sizes and positions beyond 4 GiB are written as zip64, which torch reads.
    """

    def __init__(self, start: int) -> None:
        self.start, self.at = start, start
        self.segments: list[Fixed | Slot | Trailer] = []
        self.rows: list[tuple[str, int, int, str | int]] = []  # name, header offset, size, crc or the tensor it is of

    def add(self, name: str, data: bytes) -> None:
        """Add an entry whose bytes are known."""
        header = self._header(name, len(data), zlib.crc32(data), 0)
        self.rows.append((name, self.at - self.start, len(data), zlib.crc32(data)))
        self._fixed(header + data)

    def add_tensor(self, name: str, tensor: str, size: int) -> None:
        """Leave aligned room for a tensor's bytes; its checksum follows the data, as zip allows (flag bit 3).

        Args:
            name: name of the zip entry.
            tensor: name of the tensor whose bytes go there.
            size: number of bytes.
        """
        header = self._header(name, size, None, ALIGNMENT)
        self.rows.append((name, self.at - self.start, size, tensor))
        self._fixed(header)
        self.segments.append(Slot(self.at, size, tensor))
        self.at += size
        form = "<IIQQ" if size >= 0xFFFFFFFF else "<IIII"

        def descriptor(crcs: dict[str, int]) -> bytes:
            return struct.pack(form, 0x08074B50, crcs[tensor], size, size)

        self._trailer(struct.calcsize(form), descriptor)

    def close(self) -> None:
        """Add the zip's central directory, which ends the archive."""
        offset = self.at - self.start
        rows = list(self.rows)

        def directory(crcs: dict[str, int]) -> bytes:
            body = b"".join(_central(n, o, s, crcs[c] if isinstance(c, str) else c) for n, o, s, c in rows)
            return body + _end(len(rows), len(body), offset)

        self._trailer(len(directory({c: 0 for *_, c in rows if isinstance(c, str)})), directory)

    def _fixed(self, data: bytes) -> None:
        self.segments.append(Fixed(self.at, data))
        self.at += len(data)

    def _trailer(self, size: int, make: Callable[[dict[str, int]], bytes]) -> None:
        self.segments.append(Trailer(self.at, size, make))
        self.at += size

    def _header(self, name: str, size: int, crc: int | None, alignment: int) -> bytes:
        """Make an entry's local header; `crc` is None where the checksum follows the data."""
        extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= 0xFFFFFFFF else b""
        if alignment:
            bare = self.at - self.start + 30 + len(name) + len(extra) + 4
            gap = -bare % alignment
            extra += struct.pack("<2sH", b"FB", gap) + b"Z" * gap  # the padding field that torch.save uses
        short = min(size, 0xFFFFFFFF)
        flags, sizes = (0x0808, (0, 0, 0)) if crc is None else (0x0800, (crc, short, short))
        if crc is None and size >= 0xFFFFFFFF:
            sizes = (0, 0xFFFFFFFF, 0xFFFFFFFF)
        version = 45 if extra[:2] == b"\1\0" else 0  # 4.5 is what zip64 sizes ask for
        fields = (b"PK\x03\x04", version, flags, 0, 0, 0, *sizes, len(name), len(extra))
        return struct.pack("<4s5H3I2H", *fields) + name.encode() + extra


def _central(name: str, offset: int, size: int, crc: int) -> bytes:
    """Make an entry's record in the central directory."""
    extra = b""
    if size >= 0xFFFFFFFF or offset >= 0xFFFFFFFF:
        wide = ([size, size] if size >= 0xFFFFFFFF else []) + ([offset] if offset >= 0xFFFFFFFF else [])
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide)
    short = min(size, 0xFFFFFFFF)
    version, place = 45 if extra else 0, min(offset, 0xFFFFFFFF)
    fields = (version, version, 0x0808, 0, 0, 0, crc, short, short, len(name), len(extra), 0, 0, 0, 0, place)
    return struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + name.encode() + extra


def _end(count: int, size: int, offset: int) -> bytes:
    """Make the end of the central directory, in zip64 form where the numbers need it."""
    wide = b""
    if offset >= 0xFFFFFFFF or count >= 0xFFFF:
        wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    short = min(count, 0xFFFF)
    return wide + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, short, short, min(size, 0xFFFFFFFF), min(offset, 0xFFFFFFFF), 0
    )


def tensor_object(tensor: SinkTensor, key: str) -> Object:
    """Make the pickled call that torch.load turns into a tensor over one storage.

    Args:
        tensor: name, dtype and shape of the tensor; it is laid out row-major from the storage's first element.
        key: key of the storage, the `0` of the entry `data/0`.

    Returns:
        The call, for `emit` to pickle.

    Raises:
        TensorkeepError: torch has no such dtype.
    """
    spelled = DTYPES[tensor.dtype].torch
    if spelled not in FROM_TORCH:
        raise TensorkeepError(
            f"{tensor.dtype} cannot be kept in a torch.save file",
            where=tensor.name,
            hint="keep it in safetensors (--to hf)",
        )
    storage = STORAGE_OF.get(tensor.dtype)
    elements = tensor.nbytes if storage is None else tensor.nbytes * 8 // DTYPES[tensor.dtype].bits
    kind = Global("torch", storage) if storage else Global("torch.storage", "UntypedStorage")
    identity = Persistent(("storage", kind, key, "cpu", elements))
    hooks = Object(Global("collections", "OrderedDict"))  # backward hooks: none
    args: tuple[Any, ...] = (identity, 0, tensor.shape, row_major(tensor.shape), False, hooks)
    if storage:
        return Object(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Object(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", str(spelled))))


def build_archive(start: int, value: Any, tensors: Sequence[tuple[str, SinkTensor]]) -> ArchiveBuilder:
    """Lay out a whole archive, with its entries in the order in which torch.save writes them.

    Args:
        start: byte of the file at which the archive begins.
        value: what torch.load is to return: plain data, with `tensor_object` for tensors.
        tensors: (storage key, tensor) for every storage that `value` refers to.

    Returns:
        The closed builder; its `segments` are the layout and `at` is the byte behind the archive.
    """
    made = ArchiveBuilder(start)
    made.add("archive/data.pkl", emit(value))
    made.add("archive/byteorder", b"little")
    for key, tensor in tensors:
        made.add_tensor(f"archive/data/{key}", tensor.name, tensor.nbytes)
    made.add("archive/version", b"3\n")
    made.close()
    return made


def lone_archives() -> Callable[[int, SinkTensor], tuple[list[Fixed | Slot | Trailer], int]]:
    """Return a function that lays out archives of one tensor each; those of equal dtype and shape share their bytes.

    Returns:
        A function of the byte of the file at which an archive begins and of its tensor; it gives the archive's segments
        and the byte behind it.
    """
    known: dict[tuple[str, tuple[int, ...]], tuple[bytes, int, Callable[[int], bytes]]] = {}

    def archive(start: int, tensor: SinkTensor) -> tuple[list[Fixed | Slot | Trailer], int]:
        alike = known.get((tensor.dtype, tensor.shape))
        if alike is None:
            alike = known[tensor.dtype, tensor.shape] = _around(tensor)
        head, size, tail = alike
        name, data = tensor.name, start + len(head)
        after = data + tensor.nbytes
        trailer = Trailer(after, size, lambda crcs: tail(crcs[name]))
        return [Fixed(start, head), Slot(data, tensor.nbytes, name), trailer], after + size

    return archive


def _around(tensor: SinkTensor) -> tuple[bytes, int, Callable[[int], bytes]]:
    """Return what stands before a tensor in an archive of its own, the size of what follows, and that by its CRC-32."""
    made = build_archive(0, tensor_object(tensor, "0"), [("0", tensor)]).segments
    at = next(i for i, segment in enumerate(made) if isinstance(segment, Slot))
    head = b"".join(segment.data for segment in made[:at] if isinstance(segment, Fixed))
    rest = made[at + 1 :]

    def tail(crc: int) -> bytes:
        crcs = {tensor.name: crc}
        return b"".join(s.data if isinstance(s, Fixed) else s.make(crcs) for s in rest if not isinstance(s, Slot))

    return head, len(tail(0)), tail
