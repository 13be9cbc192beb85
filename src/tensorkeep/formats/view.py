"""The state view: a read-only mapping from tensor name to record, whose data is read when it is asked for.

`read(path)` finds the format, reads headers only, and checks every byte range against its file. Data comes out as a
stream of raw bytes in row-major order (`stream`), as a numpy array (`array`) or as a torch tensor (`tensor`);
torch is imported by `tensor` alone.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats._spans import Span, announce, cut, in_order, row_spans, stretch, within_rows
from tensorkeep.formats.arrays import np_frombuffer
from tensorkeep.formats.companions import Companion, add_companions
from tensorkeep.formats.config_types import believed
from tensorkeep.formats.table import FORMATS, unrecognised
from tensorkeep.storage.files import Folder, LocalFolder, damaged, explained, local_path, short_file
from tensorkeep.storage.record import DTYPES, Block, TensorRecord, nbytes, row_major

if TYPE_CHECKING:
    import numpy as np
    import torch

STREAM_BYTES = 4 << 20  # bytes a stream holds at a time


class Note(NamedTuple):
    """Something noticed while reading that is no error.

    Attributes:
        code: a finding code, e.g. "F07".
        message: one sentence.
        names: the tensors or files concerned.
    """

    code: str
    message: str
    names: tuple[str, ...] = ()


@dataclass(eq=False)
class StateView(Mapping[str, TensorRecord]):
    """A checkpoint as `read` opens it: a mapping from tensor name to `TensorRecord`, with ways to get at the data.

    Attributes:
        path: what the user typed.
        format: the word of the format, a key of FORMATS.
        folder: where its files lie.
        records: tensor name -> record, in the order of the files.
        config: the model's config.json; None without one.
        companions: the small files beside the weights.
        entries: what is stored beside tensors (step numbers, opaque bytes), by name.
        notes: what was noticed while reading.
        metadata: what else the format holds, by the format's own keys.
        locate: finds the raw bytes of a block that is a whole archive.
        decode: turns the stored bytes of an encoded tensor into plain ones.
        computed: its bytes are made and not stored, so no certificate is about them.
        checked: compare what is read with the file's own CRC-32 (torch writes it and never looks).

    Example:
        >>> view = read("model.safetensors")                       # doctest: +SKIP
        >>> view["lm_head.weight"].dtype, len(view.bytes("lm_head.weight"))      # doctest: +SKIP
        ('BF16', 56623104)
    """

    path: str
    format: str
    folder: Folder
    records: dict[str, TensorRecord]
    config: dict[str, Any] | None = None
    companions: list[Companion] = field(default_factory=list)
    entries: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    locate: Callable[[Folder, TensorRecord, Block], Block] | None = None
    decode: Callable[[TensorRecord, memoryview], memoryview] | None = None
    computed: bool = False  # its bytes are made and not stored, so no certificate is about them
    checked: bool = False  # compare what is read with the file's own CRC-32 (torch writes it and never looks)

    def __getitem__(self, name: str) -> TensorRecord:
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def home(self) -> Folder:
        """The folder of the whole save, in which optimizer and random state lie; mostly that of the weights."""
        place = self.metadata.get("home")
        return LocalFolder(place) if place is not None else self.folder

    def _blocks(self, record: TensorRecord) -> list[Block]:
        """Return the record's blocks with raw bytes located, in order of their position in the tensor."""
        blocks = [self.locate(self.folder, record, b) if b.archive and self.locate else b for b in record.blocks]
        for block in blocks:
            if block.start + block.nbytes > self.folder.size(block.file):
                raise short_file(
                    f"{self.folder.url}/{block.file}", block.start, block.nbytes, self.folder.size(block.file)
                )
        return sorted(blocks, key=lambda b: b.offsets)

    def spans(self, name: str) -> list[Span] | None:
        """List the byte ranges that make up a plainly stored tensor in row-major order.

        Args:
            name: name of the tensor.

        Returns:
            (file, first byte, bytes, their CRC-32 or None) for each; None where no such ranges exist.
        """
        record = self.records[name]
        return row_spans(record, self._blocks(record)) if record.encoding == "plain" and record.blocks else None

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Give the tensor's bytes in row-major order, piece by piece, in one reused buffer.

        A tensor whose blocks are not whole rows (sharded on a later dimension, transposed) is assembled in memory.

        Args:
            name: name of the tensor.
            rows: (first, last) takes that slice of the first dimension.
            granule: every piece but the last is a multiple of this many bytes.
            chunk: bytes of a piece, about.

        Yields:
            The bytes of one piece, valid until the next is asked for.

        Raises:
            TensorkeepError: F02 where a file is shorter than its header says, F03 where `checked` found damage.
        """
        record = self.records[name]
        if record.encoding != "plain":
            yield from self._decoded(record, rows, granule, chunk)
            return
        spans = row_spans(record, self._blocks(record))
        row_bytes = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
        first, last = rows or (0, record.shape[0] if record.shape else 1)
        if spans is None:
            whole = memoryview(self._assemble(record))[first * row_bytes : last * row_bytes]
            step = max(chunk // granule, 1) * granule
            yield from (whole[at : at + step] for at in range(0, len(whole), step))
            return
        yield from self._spanned(name, list(cut(spans, first * row_bytes, last * row_bytes)), granule, chunk)

    def _spanned(self, name: str, spans: list[Span], granule: int, chunk: int) -> Iterator[memoryview]:
        """Give the bytes of consecutive spans piece by piece, in one reused buffer."""
        total = sum(length for _, _, length, _ in spans)
        step = min(max(chunk // granule, 1) * granule, total)
        buffer, filled = memoryview(bytearray(step)), 0
        announce(self.folder, spans)
        for file, start, length, crc in spans:
            done = found = 0
            while done < length:
                take = min(length - done, step - filled)
                piece = buffer[filled : filled + take]
                self.folder.read_into(file, start + done, piece)
                done, filled = done + take, filled + take
                if self.checked and crc is not None:
                    found = zlib.crc32(piece, found)
                    if done == length and found != crc:
                        raise damaged(f"{self.folder.url}/{file}", [name])
                if filled == step:
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def elements(
        self, name: str, first: int, last: int, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Give the bytes of some of a tensor's elements, numbered in row-major order, and read no others.

        An encoded tensor, and a view that makes its bytes, are read by whole rows.

        Args:
            name: name of the tensor.
            first: number of the first element.
            last: number behind the last one.
            granule: every piece but the last is a multiple of this many bytes, where `first` begins a row.
            chunk: bytes of a piece, about.

        Yields:
            The bytes of one piece, valid until the next is asked for.

        Raises:
            TensorkeepError: F02 where a file is shorter than its header says.
        """
        record = self.records[name]
        if first >= last:
            return
        width = DTYPES[record.dtype].bits // 8
        made = type(self).stream is not StateView.stream or record.encoding != "plain" or not width
        if made or not record.shape:
            inner = math.prod(record.shape[1:])
            rows = (first // inner, -(-last // inner)) if record.shape else None
            found = self.stream(name, rows, granule, chunk)
            yield from within_rows(found, record, 0 if rows is None else rows[0] * inner, first, last)
            return
        blocks = self._blocks(record)
        spans = row_spans(record, blocks)
        if spans is not None:
            yield from self._spanned(name, list(cut(spans, first * width, last * width)), granule, chunk)
        elif all(in_order(block) for block in blocks):
            step = max(chunk // granule, 1) * granule // width
            for at in range(first, last, max(step, 1)):
                yield stretch(self.folder, record, blocks, at, min(at + max(step, 1), last))
        else:
            yield memoryview(self._assemble(record))[first * width : last * width]

    def _decoded(
        self, record: TensorRecord, rows: tuple[int, int] | None, granule: int, chunk: int
    ) -> Iterator[memoryview]:
        """Give an encoded tensor a few rows of its last dimension at a time: encodings never reach across such rows."""
        if self.decode is None:
            raise TensorkeepError(
                f"{record.name} is stored as {record.encoding}, which {self.format} cannot decode", where=self.path
            )
        count = math.prod(record.shape[:-1])
        made = record.nbytes // max(count, 1)  # bytes of one row
        inner = math.prod(record.shape[1:-1])  # rows in one step of the first dimension
        first, last = (0, count) if rows is None else (rows[0] * inner, rows[1] * inner)
        unit = math.lcm(granule, max(made, 1))
        step = max(chunk // unit, 1) * unit // max(made, 1)
        for at in range(first, last, step):
            yield self.decode(record, self._rows_as_stored(record, at, min(at + step, last)))

    def _rows_as_stored(self, record: TensorRecord, first: int, last: int) -> memoryview:
        """Read some rows of the last dimension of an encoded tensor."""
        (block,) = self._blocks(record)
        stored = block.nbytes // max(math.prod(record.shape[:-1]), 1)
        raw = memoryview(bytearray((last - first) * stored))
        self.folder.read_into(block.file, block.start + first * stored, raw)
        return raw

    def as_stored(self, name: str, chunk: int = STREAM_BYTES) -> Iterator[tuple[memoryview, memoryview]] | None:
        """Give an encoded tensor's bytes as they lie, with what they decode to.

        Args:
            name: name of the tensor.
            chunk: bytes of a piece once decoded, about.

        Returns:
            Pieces of whole rows; None where the tensor is not encoded, or nothing here decodes it.
        """
        record, decode = self.records[name], self.decode
        if record.encoding == "plain" or decode is None:
            return None
        count = math.prod(record.shape[:-1])
        step = max(chunk // max(record.nbytes // max(count, 1), 1), 1)
        raws = (self._rows_as_stored(record, at, min(at + step, count)) for at in range(0, count, step))
        return ((raw, decode(record, raw)) for raw in raws)

    def _assemble(self, record: TensorRecord) -> bytearray:
        """Put the blocks of a tensor together in memory."""
        import numpy as np

        width = DTYPES[record.dtype].bits // 8
        whole = bytearray(record.nbytes)
        target = np.frombuffer(whole, dtype=f"V{width}").reshape(record.shape)
        for block in self._blocks(record):
            raw = bytearray(block.nbytes)
            self.folder.read_into(block.file, block.start, memoryview(raw))
            strides = block.strides or row_major(block.shape)
            piece = np.ndarray(block.shape, f"V{width}", raw, strides=[s * width for s in strides])
            target[tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape))] = piece
        return whole

    def bytes(self, name: str) -> bytearray:
        """Return the whole tensor's bytes in row-major order."""
        out = bytearray()
        for piece in self.stream(name):
            out += piece
        return out

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return the tensor as a numpy array of its own dtype (bf16 and fp8 through ml_dtypes)."""
        record = self.records[name]
        return np_frombuffer(self.bytes(name), record.dtype).reshape(record.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor as a torch tensor of its own dtype, on the CPU, owning its memory.

        Raises:
            TensorkeepError: torch has no such dtype.
        """
        import torch

        record = self.records[name]
        spelled = DTYPES[record.dtype].torch
        if spelled is None or not hasattr(torch, spelled):
            raise TensorkeepError(f"torch has no dtype for {record.dtype}", where=f"{self.path}: {name}")
        dtype = getattr(torch, spelled)
        if record.elements == 0:
            return torch.empty(record.shape, dtype=dtype)
        shape = record.shape
        if record.dtype == "F4":  # torch packs two into one element
            if not shape or shape[-1] % 2:
                raise TensorkeepError(
                    f"torch holds F4 in pairs, shape {list(shape)} has an odd end", where=f"{self.path}: {name}"
                )
            shape = (*shape[:-1], shape[-1] // 2)
        return torch.frombuffer(self.bytes(name), dtype=dtype).reshape(shape)

    def digest(self, name: str) -> str:
        """Return the xxh3_128 of the tensor's raw little-endian bytes, in hex."""
        state = xxhash.xxh3_128()
        for piece in self.stream(name):
            state.update(piece)
        return state.hexdigest()


def open_folder(path: str) -> tuple[Folder, str | None]:
    """Return the folder that a path stands for, and the file in it where the path names a file, else None."""
    path = path.removeprefix("file://")
    if "://" in path:
        from tensorkeep.storage.remote import open_remote

        return open_remote(path)
    local = local_path(path)
    with explained(local):
        if local.is_dir():
            return LocalFolder(local), None
        if local.exists():
            return LocalFolder(local.parent), local.name
    from tensorkeep.storage.hub import cached_snapshot  # `org/name`, when nothing of that path exists here

    return LocalFolder(cached_snapshot(path)), None


def read(path: str | Path) -> StateView:
    """Open a checkpoint of any format; headers are read, every byte range is checked, no data is loaded.

    Args:
        path: a file, a folder, a URL that fsspec knows, or the id of a model on the Hugging Face Hub.

    Returns:
        A mapping from tensor name to record, with ways to get at the data.

    Raises:
        TensorkeepError: nothing is recognised, or the files contradict themselves.

    Example:
        >>> read("model.safetensors")["lm_head.weight"].shape  # doctest: +SKIP
        (49152, 576)
    """
    folder, name = open_folder(str(path))
    view = recognised(folder, [name] if name else folder.names(), str(path), single=name is not None)
    _check_names(view)
    if name is not None and any(n.startswith("base_model.") for n in view):
        importlib.import_module(FORMATS["peft"]).add_config(view, name)
    add_companions(view, believed)
    return view


def recognised(
    folder: Folder, names: list[str], path: str, *, single: bool = False, but: str | None = None
) -> StateView:
    """Let the first format that recognises the files read them.

    Args:
        folder: where the files lie.
        names: its files.
        path: what the user typed, for messages.
        single: whether a file was named.
        but: a format that is not asked.

    Returns:
        The view, without companions.

    Raises:
        TensorkeepError: F05 or F01, none recognises them.
    """
    for word, module in FORMATS.items():
        form = importlib.import_module(module) if word != but else None
        if form is not None and form.sniff(folder, names, single=single):
            view: StateView = form.read(folder, names, path)
            return view
    raise unrecognised(folder, names, path)


def _check_names(view: StateView) -> None:
    """Raise F07 where a tensor's name is no text."""
    for name in view.records:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            what, hint = f"a tensor's name is no text: {name!r}", "the file is damaged; copy it again"
            raise TensorkeepError(what, where=view.path, code="F07", hint=hint)
