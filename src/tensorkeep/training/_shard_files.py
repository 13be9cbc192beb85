"""What one rank writes of a sharded save: laid out beforehand, written durably, described for the manifest.

The file is what torch's own FileSystemWriter makes, a torch.save archive for each chunk one after another, so that
plain torch reads it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable
from tensorkeep.storage.archive_writing import ALIGNMENT, build_archive, tensor_object
from tensorkeep.storage.layout import FileLayout, Fixed, SinkTensor, Slot, Trailer
from tensorkeep.storage.manifest_entries import FileEntry, ShardEntry, list_bytes, list_name, row_pieces
from tensorkeep.storage.record import FROM_TORCH, nbytes
from tensorkeep.training.state_files import floating, raw

Resolve = Callable[[MetadataIndex], Tensor]
Place = tuple[str, int, int]  # file, first byte, bytes


class Item(NamedTuple):
    """A chunk of a tensor, or an object that is no tensor, in the file.

    Attributes:
        at: torch's name for it.
        dtype: as safetensors spells it.
        shape: sizes of the chunk.
        offset: index of its first element in the whole tensor; None for an object.
        start: first byte of its data.
        archive: first byte and bytes of its archive, with a gap before it.
        frame: what the archive holds beside the data.
        slots: a slot for each piece of its data.
    """

    at: MetadataIndex
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...] | None
    start: int
    archive: tuple[int, int]
    frame: tuple[Fixed | Trailer, ...]
    slots: tuple[Slot, ...]

    @property
    def place(self) -> tuple[int, int]:
        """First byte and bytes of what torch reads."""
        gap = len(self.frame[0].data) if self.frame and isinstance(self.frame[0], Fixed) else 0
        return self.archive[0] + gap, self.archive[1] - gap


@dataclass
class Share:
    """One rank's file.

    Attributes:
        layout: with one slot for each chunk, under its key.
        cut: the same bytes, with a slot for each piece that has a digest.
        items: the chunks, by key.
        objects: bytes of the objects that are no tensors, by key.
    """

    layout: FileLayout
    cut: FileLayout
    items: dict[str, Item]
    objects: dict[str, memoryview] = field(default_factory=dict)


class Report(NamedTuple):
    """What one rank wrote.

    Attributes:
        file: the file's name; "" where this rank had nothing to write.
        files: size and digests of the file and of the list of what lies in it.
        places: where each chunk lies, for torch.
        host: where it was written.
    """

    file: str
    files: dict[str, FileEntry]
    places: dict[MetadataIndex, Place]
    host: str


def lay_out(file: str, items: Sequence[WriteItem], objects: Mapping[MetadataIndex, io.BytesIO]) -> Share:
    """Lay out one rank's file.

    Args:
        file: its name.
        items: what the planner gave this rank to write.
        objects: the bytes of those items that are no tensors.

    Raises:
        TensorkeepError: a tensor's dtype cannot be stored.
    """
    whole: list[Fixed | Slot | Trailer] = []
    share, at = Share(FileLayout(file, whole), FileLayout(file, []), {}), 0
    for number, item in enumerate(items):
        key = str(number)
        if item.tensor_data is None:
            data = objects[item.index].getbuffer()
            share.objects[key] = data
            whole.append(Slot(at, len(data), key))
            end = at + len(data)
            share.items[key] = Item(item.index, "U8", (len(data),), None, at, (at, len(data)), (), ())
        else:
            dtype = FROM_TORCH.get(str(item.tensor_data.properties.dtype).removeprefix("torch."))
            if dtype is None:
                what = f"{item.index.fqn} cannot be stored as it is: {item.tensor_data.properties.dtype}"
                raise TensorkeepError(what, where=file, tensors=[item.index.fqn])
            chunk = item.tensor_data.chunk
            sink = SinkTensor(key, dtype, tuple(chunk.sizes))
            gap = Fixed(at, bytes(-at % ALIGNMENT))  # the archive aligns its data from its own first byte on
            archive = build_archive(at + len(gap.data), tensor_object(sink, "0"), [("0", sink)])
            whole += [gap, *archive.segments]
            end = archive.at
            frame = (gap, *(s for s in archive.segments if not isinstance(s, Slot)))
            (slot,) = (s for s in archive.segments if isinstance(s, Slot))
            share.items[key] = Item(
                item.index, dtype, sink.shape, tuple(chunk.offsets), slot.start, (at, end - at), frame, ()
            )
        at = end
    share.cut = FileLayout(file, _cut(share))
    return share


def _cut(share: Share) -> list[Fixed | Slot | Trailer]:
    """Give every piece of a chunk a slot of its own."""
    out: list[Fixed | Slot | Trailer] = []
    for segment in share.layout.segments:
        if not isinstance(segment, Slot):
            out.append(segment)
            continue
        item = share.items[segment.tensor]
        row = nbytes(item.dtype, item.shape[1:]) if item.shape else segment.nbytes
        slots = tuple(
            Slot(segment.start + first * row, rows * row, f"{segment.tensor}.{number}")
            for number, (first, rows) in enumerate(row_pieces(item.dtype, item.shape))
        )
        share.items[segment.tensor] = item._replace(slots=slots)
        out += slots
    return out


def source_of(share: Share, resolve: Resolve) -> durable.Bytes:
    """Return a function that gives the bytes of a slot of `share.cut`; at most two tensors are held.

    Args:
        share: the file.
        resolve: gives a chunk, on any device.
    """
    held: dict[str, memoryview] = dict(share.objects)
    order: list[str] = []

    def give(slot: str) -> memoryview:
        key, _, piece = slot.partition(".")
        item = share.items[key]
        if key not in held:
            held[key] = raw(plain(resolve(item.at), item.at.fqn).cpu().contiguous())
            order.append(key)
            if len(order) > 2:
                del held[order.pop(0)]
        part = item.slots[int(piece)]
        return held[key][part.start - item.start :][: part.nbytes]

    return give


def plain(tensor: Tensor, name: str) -> Tensor:
    """Return a chunk without gradient and lazy bits; refuse what is no plain tensor of its dtype and shape."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        what = f"{name} cannot be stored as it is: a {type(tensor).__name__}, {tensor.layout}, on {tensor.device}"
        raise TensorkeepError(what, where="checkpoint", tensors=[name])
    return tensor.detach().resolve_conj().resolve_neg()


def write(
    folder: Path, share: Share, source: durable.Bytes | memoryview, looked: Callable[[str], bool], host: str
) -> tuple[Report, list[str]]:
    """Write one rank's file and the list of what lies in it; both are on the disk when this returns, the folder is not.

    Args:
        folder: where it goes.
        share: the file.
        source: the bytes of each slot, or the file's image, which may lack the checksums.
        looked: tells by a tensor's name whether to look through it for NaN and Inf.
        host: where this is.

    Returns:
        What was written, and the names of tensors that hold NaN or Inf.

    Raises:
        OSError: as the system gives it.
    """
    if not share.items:
        return Report("", {}, {}, host), []
    parts = {slot.tensor: key for key, item in share.items.items() for slot in item.slots}
    floats = {
        slot.tensor: item.dtype
        for item in share.items.values()
        for slot in item.slots
        if item.offset is not None and floating(item.dtype) and looked(item.at.fqn)
    }
    name = share.cut.name
    done = durable.write_file(folder / name, share.cut, source, floats, parts)
    unsound = list(dict.fromkeys(share.items[slot.partition(".")[0]].at.fqn for slot in done.unsound))
    places = {item.at: (name, *item.place) for item in share.items.values()}
    listed = durable.write_small(folder / list_name(name), list_bytes(_entries(share, done)))
    files = {name: FileEntry(done.size, done.chunks), list_name(name): FileEntry(listed.size, listed.chunks)}
    return Report(name, files, places, host), unsound


def _entries(share: Share, done: durable.Written) -> list[ShardEntry]:
    """Describe what was written."""
    out = []
    for key, item in share.items.items():
        crcs: dict[str, Any] = {key: done.crcs.get(key, 0)}
        frame = b"".join(s.data if isinstance(s, Fixed) else s.make(crcs) for s in item.frame)
        pieces = tuple(done.tensors[slot.tensor] for slot in item.slots)
        digest = durable.digest(frame)
        out.append(
            ShardEntry(item.at.fqn, item.dtype, item.shape, item.offset, item.start, pieces, item.archive, digest)
        )
    return out
