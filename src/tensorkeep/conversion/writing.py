"""Write the files of an output: several side by side, each flushed and read back while the others are being written.

A worker takes the next job of the file that the fewest others write to (two threads in one file wait for each other in
the kernel). A job is a run of small tensors, one tensor, or a piece of a large one. Who ends a file's last job writes
its headers and checksums, flushes it to the disk and reads it back.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from tensorkeep.conversion._ranked import write_ranked
from tensorkeep.conversion._runs import copy, runs
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.streams import Pieces, Sums, rows_apart, with_ties, write_tensor
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import STREAM_BYTES
from tensorkeep.storage.files import Progress, explained
from tensorkeep.storage.layout import FileLayout, Fixed, Slot, Trailer
from tensorkeep.storage.spreading import batches, cores

_FEW = 4  # threads where tensors are computed: each may hold a whole one
_MORE_FILES = 2  # files open beyond one for each worker: some are being flushed
_CUT = 64 << 20  # bytes of a tensor from which on several threads share it

Place = tuple[str, int, int]  # file, first byte, bytes


class _Job(NamedTuple):
    """Tensors to write, or rows of one: `pieces` puts the checksums of all its rows together."""

    slots: list[Slot]
    rows: tuple[int, int] | None = None
    pieces: Pieces | None = None


class _File:
    """One file on its way to the disk."""

    def __init__(self, layout: FileLayout, path: Path, jobs: Iterator[_Job]) -> None:
        self.layout, self.path, self.jobs = layout, path, deque(jobs)
        self.left, self.busy, self.handle = len(self.jobs), 0, -1
        self.sums: dict[str, Sums] = {}

    def open(self) -> None:
        with explained(self.path):
            self.handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)  # less the umask

    def close(self) -> None:
        handle, self.handle = self.handle, -1  # once, whatever interrupts it
        if handle >= 0:
            os.close(handle)


class _Writing:
    """All files of an output, and which worker does what next."""

    def __init__(self, layouts: Sequence[FileLayout], folder: Path, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
        self.total, self.done = sum(slot.nbytes for layout in layouts for slot in layout.slots), 0
        self.workers = min(_FEW, cores()) if any(v.computed for v in plan.sources) else cores()
        self.waiting = deque(_File(f, folder / f.name, self._jobs(f)) for f in layouts)
        self.open: list[_File] = []
        self.sums: dict[str, Sums] = {}
        self.read_back: dict[Place, str] = {}
        self.failed: BaseException | None = None
        self.turn = threading.Condition()

    def _jobs(self, layout: FileLayout) -> Iterator[_Job]:
        alone = 1 << 62
        for batch in batches(layout.slots, lambda slot: slot.nbytes if slot.nbytes < _CUT else alone):
            step = self.steps[batch[0].tensor]
            rows = rows_apart(step, self.plan.sources, STREAM_BYTES) if batch[0].nbytes >= _CUT else None
            if rows is None or self.workers == 1:
                yield _Job(batch)
                continue
            pieces = Pieces(step, self.plan.sources, layout.wants_crc, len(rows))
            yield from (_Job(batch, part, pieces) for part in rows)

    def fail(self, error: BaseException) -> None:
        """Stop all workers; the first error is the one that is told."""
        with self.turn:
            self.failed = self.failed or error
            self.turn.notify_all()

    def take(self) -> tuple[_File, _Job | None] | None:
        """Return the next job and its file, or a file that has none and is to be ended; None where nothing is left."""
        with self.turn:
            while self.failed is None:
                while self.waiting and len(self.open) < self.workers + _MORE_FILES:
                    file = self.waiting.popleft()
                    file.open()
                    self.open.append(file)
                    if not file.jobs:
                        return file, None
                with_jobs = [f for f in self.open if f.jobs]
                if with_jobs:
                    file = min(with_jobs, key=lambda f: f.busy)
                    file.busy += 1
                    return file, file.jobs.popleft()
                if not self.waiting:
                    return None
                self.turn.wait()
        return None

    def work(self) -> None:
        """Do jobs until none is left; the life of one thread."""
        try:
            while (taken := self.take()) is not None:
                file, job = taken
                with explained(file.path):
                    found = self._fill(file, job) if job is not None else {}
                with self.turn:
                    file.busy -= job is not None
                    file.left -= job is not None
                    file.sums.update(found)
                    ended = file.left == 0
                if ended:
                    self._end(file)
        except BaseException as error:  # noqa: BLE001  carried to the caller's thread and raised there
            self.fail(error)

    def _fill(self, file: _File, job: _Job) -> dict[str, Sums]:
        """Write the tensors of a job into their places, or one piece of a tensor."""
        found: dict[str, Sums] = {}

        def place(pieces: list[memoryview], at: int) -> None:
            size = sum(len(piece) for piece in pieces)
            done = os.pwritev(file.handle, pieces, at)
            if done < size:
                write_all(file.handle, b"".join(pieces)[done:], at + done)
            self._count(size)

        together, alone = runs(job.slots, self.steps, self.plan) if len(job.slots) > 1 else ([], job.slots)
        if together:
            found |= copy(together, self.steps, place, file.layout.wants_crc)
        for slot in alone:
            step, begin = self.steps[slot.tensor], slot.start
            at = begin

            def write(piece: memoryview) -> None:
                nonlocal at
                write_all(file.handle, piece, at)
                at += len(piece)
                self._count(len(piece))

            if job.pieces is None or job.rows is None:
                found[slot.tensor] = write_tensor(step, self.plan.sources, write, file.layout.wants_crc)
                end = begin + slot.nbytes
            else:
                at, end = (begin + job.pieces.row * row for row in job.rows)
                whole = job.pieces.write(job.rows, write, lambda: self.failed is not None)
                found |= {slot.tensor: whole} if whole is not None else {}
            if at != end:
                raise TensorkeepError(
                    f"{slot.tensor}: {at - begin} bytes instead of {end - begin}",
                    hint="the source changed while it was read",
                )
        return found

    def _count(self, size: int) -> None:
        with self.turn:
            if self.failed is not None:
                raise TensorkeepError("interrupted")  # by a failure elsewhere, which is the one that is told
            self.done += size
            done = self.done
        self.progress("write", done, self.total)

    def _end(self, file: _File) -> None:
        """Write what is not tensors, flush the file, read its tensors back."""
        with explained(file.path):
            _write_rest(file.handle, file.layout, {n: s.crc for n, s in file.sums.items()})
            os.fsync(file.handle)
            file.close()
            places = self._read_back(file)
        with self.turn:
            self.sums.update(file.sums)
            self.read_back.update(places)
            self.open.remove(file)
            self.turn.notify_all()

    def _read_back(self, file: _File) -> dict[Place, str]:
        """Compare the bytes in a flushed file with what was meant to be written; return the digest of each place."""
        places: dict[Place, str] = {}
        largest = max((slot.nbytes for slot in file.layout.slots), default=0)
        room = memoryview(bytearray(STREAM_BYTES if len(file.layout.slots) > 1 else min(largest, STREAM_BYTES)))
        low = high = 0  # what is in `room`
        handle = os.open(file.path, os.O_RDONLY)
        try:
            for slot in file.layout.slots:
                sink = self.steps[slot.tensor].sink
                if sink is None or sink.encoding != "plain":  # its digest is of the values that it decodes to
                    continue
                if self.failed is not None:
                    break
                state, at, end = xxhash.xxh3_128(), slot.start, slot.start + slot.nbytes
                while at < end:
                    if not low <= at < high:  # as much as there is room for: the next tensors lie behind
                        low, high = at, at + os.preadv(handle, [room], at)
                    if high == at:
                        break  # the file ends: the digest tells
                    state.update(room[at - low : min(end, high) - low])
                    at = min(end, high)
                if state.hexdigest() != file.sums[slot.tensor].digest:
                    raise TensorkeepError(
                        f"read back, {slot.tensor} is not what the plan made",
                        where=file.path,
                        code="F03",
                        hint="check the disk, then run again",
                    )
                places[file.layout.name, slot.start, slot.nbytes] = file.sums[slot.tensor].digest
        finally:
            os.close(handle)
        return places


def write_files(
    layouts: Sequence[FileLayout],
    folder: Path,
    plan: Plan,
    progress: Progress,
    read_back: dict[Place, str] | None = None,
) -> dict[str, Sums]:
    """Write, fsync and read back every file of an output, in a folder that is there already.

    Args:
        layouts: the files, and where each tensor lies in them.
        folder: where they are made; none of them may exist.
        plan: says what each tensor is made of.
        progress: called as `progress("write", done, total)` with bytes.
        read_back: gets the digest of each place that was read back from the disk; `prove` takes it. Of an output as
            several ranks write it nothing is read back here, and `prove` reads it all.

    Returns:
        The checksums of every tensor, by output name.

    Raises:
        TensorkeepError: a disk is full or fails, a source gives other bytes than its header promised, or a file is not
            what was written (F03).
    """
    if plan.ranks is not None:
        return with_ties(write_ranked(layouts, folder, plan, progress, write_all, _write_rest), plan)
    writing = _Writing(layouts, folder, plan, progress)
    threads = [threading.Thread(target=writing.work, daemon=True) for _ in range(writing.workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        writing.fail(error)
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()  # nobody may write to a file's number once it is closed: it can be another's by then
        for file in writing.open:
            file.close()
    if writing.failed is not None:
        raise writing.failed
    if read_back is not None:
        read_back.update(writing.read_back)
    return with_ties(writing.sums, plan)


def write_all(handle: int, data: memoryview | bytes, at: int) -> None:
    """Write all of `data` at a position of an open file, however many calls that takes."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def _write_rest(handle: int, layout: FileLayout, crcs: dict[str, int]) -> None:
    """Write what lies between the tensors of a file: headers now known, and trailers that hold checksums."""
    for segment in layout.segments:
        if isinstance(segment, Fixed):
            write_all(handle, segment.data, segment.start)
        elif isinstance(segment, Trailer):
            write_all(handle, segment.make(crcs), segment.start)
