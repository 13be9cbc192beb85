"""File layouts: where every byte of the files to be written will lie, known before the first is written.

A format turns a list of tensors into file layouts: fixed bytes, slots for tensor data, and trailers that need
the data's checksums. So any number of threads may fill the slots, and an object store may be written front to back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tensorkeep.storage.record import PASSED_BLOCKS, nbytes

SHARD_SIZE = 5_000_000_000  # bytes of a file of weights where none is asked for; transformers' default


class SinkTensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: its name in the new checkpoint.
        dtype: its dtype as safetensors spells it.
        shape: its sizes.
        tied_to: name of another tensor to be written whose bytes it shares, where the format can share.
        encoding: "plain", or the block-quantized type of a GGUF tensor; `dtype` is then what it decodes to.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tied_to: str | None = None
    encoding: str = "plain"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, as they are stored."""
        if self.encoding == "plain":
            return nbytes(self.dtype, self.shape)
        elements, size = PASSED_BLOCKS[self.encoding]
        return math.prod(self.shape) // elements * size


class Fixed(NamedTuple):
    """Bytes that are known beforehand.

    Attributes:
        start: first byte in the file.
        data: the bytes.
    """

    start: int
    data: bytes


class Slot(NamedTuple):
    """Room for one tensor's raw bytes.

    Attributes:
        start: first byte in the file.
        nbytes: number of bytes.
        tensor: name of the tensor.
    """

    start: int
    nbytes: int
    tensor: str


class Trailer(NamedTuple):
    """Bytes that depend on the CRC-32 of tensors.

    Attributes:
        start: first byte in the file.
        size: number of bytes.
        make: gives exactly `size` bytes from {tensor name: CRC-32}.
    """

    start: int
    size: int
    make: Callable[[dict[str, int]], bytes]


@dataclass(frozen=True)
class FileLayout:
    """One file to be written.

    Args:
        name: the file's name.
        segments: what it is made of, in order of position and without gaps.

    Example:
        >>> layout = FileLayout("w.bin", [Fixed(0, b"head"), Slot(4, 12, "weight")])
        >>> layout.size, layout.wants_crc
        (16, False)
    """

    name: str
    segments: Sequence[Fixed | Slot | Trailer]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        last = self.segments[-1] if self.segments else None
        if last is None:
            return 0
        length = len(last.data) if isinstance(last, Fixed) else last.nbytes if isinstance(last, Slot) else last.size
        return last.start + length

    @cached_property  # asked for at every tensor
    def wants_crc(self) -> bool:
        """Whether a segment holds checksums of tensors (zips do, safetensors do not)."""
        return any(isinstance(s, Trailer) for s in self.segments)

    @cached_property
    def slots(self) -> list[Slot]:
        """The segments that take tensor data."""
        return [s for s in self.segments if isinstance(s, Slot)]


def small_file(name: str, data: bytes) -> FileLayout:
    """Return the layout of a file whose bytes are all known.

    Args:
        name: its name.
        data: its bytes.
    """
    return FileLayout(name, [Fixed(0, data)])


def shards(tensors: Sequence[SinkTensor], size: int) -> list[list[SinkTensor]]:
    """Spread tensors over files of at most `size` bytes, in the order given.

    Args:
        tensors: the tensors to be written.
        size: most bytes of tensor data per file; a larger tensor gets a file of its own.

    Returns:
        The tensors of each file; one empty list where there are no tensors.

    Example:
        >>> [[t.name for t in part] for part in shards([SinkTensor(n, "U8", (4,)) for n in "abc"], 8)]
        [['a', 'b'], ['c']]
    """
    out: list[list[SinkTensor]] = []
    room = 0
    for tensor in tensors:
        if not out or tensor.nbytes > room:
            out.append([])
            room = size
        out[-1].append(tensor)
        room -= tensor.nbytes
    return out or [[]]
