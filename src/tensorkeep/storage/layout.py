"""Layouts: where every byte of a sink will lie, known before the first is written.

A format turns a list of sink tensors into file layouts: fixed bytes, slots for tensor data, and trailers that need
the data's checksums. So any number of threads may fill the slots, and a remote sink may be written front to back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tensorkeep.storage.record import nbytes

SHARD_SIZE = 5_000_000_000  # bytes of a file of weights where none is asked for; transformers' default


class SinkTensor(NamedTuple):
    """A tensor of the sink. `tied_to` names an untied one whose bytes it shares (formats that can, do)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied_to: str | None = None

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


class Fixed(NamedTuple):
    """Bytes known beforehand."""

    start: int
    data: bytes


class Slot(NamedTuple):
    """Room for one tensor's raw bytes."""

    start: int
    nbytes: int
    tensor: str


class Trailer(NamedTuple):
    """Bytes that depend on the CRC-32 of tensors: `make({name: crc})` gives exactly `size` bytes."""

    start: int
    size: int
    make: Callable[[dict[str, int]], bytes]


@dataclass(frozen=True)
class FileLayout:
    """One file of a sink, its segments in order of their place and without gaps."""

    name: str
    segments: Sequence[Fixed | Slot | Trailer]

    @property
    def size(self) -> int:
        last = self.segments[-1] if self.segments else None
        if last is None:
            return 0
        length = len(last.data) if isinstance(last, Fixed) else last.nbytes if isinstance(last, Slot) else last.size
        return last.start + length

    @property
    def wants_crc(self) -> bool:
        """Whether a segment holds checksums of tensors (zips do, safetensors do not)."""
        return any(isinstance(s, Trailer) for s in self.segments)

    @property
    def slots(self) -> list[Slot]:
        return [s for s in self.segments if isinstance(s, Slot)]


def small_file(name: str, data: bytes) -> FileLayout:
    return FileLayout(name, [Fixed(0, data)])


def shards(tensors: Sequence[SinkTensor], size: int) -> list[list[SinkTensor]]:
    """Fill shards of at most `size` bytes in the order given; a larger tensor gets one of its own."""
    out: list[list[SinkTensor]] = []
    room = 0
    for tensor in tensors:
        if not out or tensor.nbytes > room:
            out.append([])
            room = size
        out[-1].append(tensor)
        room -= tensor.nbytes
    return out or [[]]
