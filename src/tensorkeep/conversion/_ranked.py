"""Write the files of an output whose tensors are cut over several files, as many ranks would have written them.

A tensor is made once, in order, and each of its bytes goes to the file of the rank that holds the row.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.streams import Sums, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import Progress, explained
from tensorkeep.storage.layout import FileLayout, Slot
from tensorkeep.storage.spreading import cores, in_threads

_FEW = 4  # threads where tensors are computed: each may hold a whole one

WriteAll = Callable[[int, memoryview, int], None]


class _Chunk(NamedTuple):
    """The part of a tensor that lies in one file."""

    file: str
    slot: Slot


def write_ranked(
    layouts: Sequence[FileLayout],
    folder: Path,
    plan: Plan,
    progress: Progress,
    write_all: WriteAll,
    write_rest: Callable[[int, FileLayout, dict[str, int]], None],
) -> dict[str, Sums]:
    """Write and fsync every file of an output, in a folder that is there already.

    Args:
        layouts: the files, in the order of ranks; a tensor's chunks lie in them in the order of its rows.
        folder: where they are made; none of them may exist.
        plan: says what each tensor is made of.
        progress: called as `progress("write", done, total)` with bytes.
        write_all: writes all of some bytes to a place of an open file.
        write_rest: writes what lies between the tensors of a file, from the CRC-32 of its chunks.

    Returns:
        The checksums of every tensor, by output name.

    Raises:
        TensorkeepError: a disk is full or fails, or a source gives other bytes than its header promised.
    """
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    chunks: dict[str, list[_Chunk]] = {}
    crcs: dict[str, dict[str, int]] = {layout.name: {} for layout in layouts}
    for layout in layouts:
        with explained(folder / layout.name):
            (folder / layout.name).open("xb").close()
        for slot in layout.slots:
            chunks.setdefault(slot.tensor, []).append(_Chunk(layout.name, slot))
    total, done = sum(slot.nbytes for layout in layouts for slot in layout.slots), 0

    few = threading.Semaphore(_FEW if any(view.computed for view in plan.sources) else cores())

    def tensor(name: str) -> Sums:
        nonlocal done
        out = _Spread(folder, chunks[name], write_all)
        few.acquire()
        try:
            sums = write_tensor(steps[name], plan.sources, out.write, False)
            out.end()
        finally:
            out.close()
            few.release()
        for chunk, crc in zip(chunks[name], out.crcs):
            crcs[chunk.file][name] = crc
        done += sum(chunk.slot.nbytes for chunk in chunks[name])
        progress("write", done, total)
        return sums

    names = list(chunks)
    found = dict(zip(names, in_threads(tensor, names, lambda n: sum(c.slot.nbytes for c in chunks[n]))))
    for layout in layouts:
        _end(folder / layout.name, lambda handle, own=layout: write_rest(handle, own, crcs[own.name]))  # type: ignore[misc]
    return found


def _end(path: Path, write_rest: Callable[[int], None]) -> None:
    """Write what a file still lacks, and flush it to the disk."""
    with explained(path):
        handle = os.open(path, os.O_RDWR)
        try:
            write_rest(handle)
            os.fsync(handle)
        finally:
            os.close(handle)


class _Spread:
    """Takes the bytes of a tensor in order, and writes each chunk of them into its file."""

    def __init__(self, folder: Path, chunks: Sequence[_Chunk], write_all: WriteAll) -> None:
        self.folder, self.left, self.write_all = folder, list(chunks), write_all
        self.crcs: list[int] = []
        self.handle, self.at, self.crc = -1, 0, 0

    def write(self, piece: memoryview) -> None:
        """Write the next bytes."""
        while len(piece):
            if not self.left:
                raise self._odd("more bytes than its shape has")
            chunk = self.left[0]
            with explained(self.folder / chunk.file):
                if self.handle < 0:
                    self.handle = os.open(self.folder / chunk.file, os.O_RDWR)
                part = piece[: chunk.slot.nbytes - self.at]
                self.write_all(self.handle, part, chunk.slot.start + self.at)
            self.crc, self.at = zlib.crc32(part, self.crc), self.at + len(part)
            piece = piece[len(part) :]
            self._next()

    def end(self) -> None:
        """Say where bytes are missing; the last chunks may be empty."""
        self._next()
        if self.left:
            raise self._odd(f"only {self.at} of {self.left[0].slot.nbytes} bytes of a chunk")

    def close(self) -> None:
        """Let go of the file at hand."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    def _next(self) -> None:
        """Go on to the next chunk that has room."""
        while self.left and self.at == self.left[0].slot.nbytes:
            self.crcs.append(self.crc)
            self.left.pop(0)
            self.at = self.crc = 0
            self.close()

    def _odd(self, what: str) -> TensorkeepError:
        return TensorkeepError(what, where=self.folder, hint="the source changed while it was read")
