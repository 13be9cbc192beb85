"""What lies in each chunk of a file that is written chunk by chunk."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from tensorkeep.storage.layout import FileLayout, Fixed, Trailer


class Piece(NamedTuple):
    """A run of bytes that goes into one chunk.

    Attributes:
        at: first byte in the chunk.
        length: number of bytes.
        name: the tensor they are of; None for bytes that the layout fixes.
        start: first byte in the tensor, or in `fixed`.
        fixed: where `name` is None the bytes themselves, or what makes them of the checksums of tensors.
    """

    at: int
    length: int
    name: str | None
    start: int  # in the tensor, or in `fixed`
    fixed: bytes | Trailer = b""

    def known(self, crcs: dict[str, int]) -> bytes:
        """Give the bytes that the layout fixes; checksums of the tensors before them are known by now."""
        if isinstance(self.fixed, bytes):
            return self.fixed
        return self.fixed.make(defaultdict(int, crcs))  # an empty tensor has none, and its CRC-32 is 0


def chunk_pieces(layout: FileLayout, size: int) -> list[list[Piece]]:
    """List what lies in each chunk of `size` bytes of a file, in order.

    >>> layout = FileLayout("f", [Fixed(0, b"abc"), Slot(3, 8, "w")])
    >>> [[piece.length for piece in chunk] for chunk in chunk_pieces(layout, 8)]
    [[3, 5], [3]]
    """
    chunks: list[list[Piece]] = [[] for _ in range(-(-layout.size // size))]
    for segment in layout.segments:
        fixed: bytes | Trailer = b""
        if isinstance(segment, Fixed):
            name, length, fixed = None, len(segment.data), segment.data
        elif isinstance(segment, Trailer):
            name, length, fixed = None, segment.size, segment
        else:
            name, length = segment.tensor, segment.nbytes
        done = 0
        while done < length:
            chunk, at = divmod(segment.start + done, size)
            take = min(length - done, size - at)
            chunks[chunk].append(Piece(at, take, name, done, fixed))
            done += take
    return chunks
