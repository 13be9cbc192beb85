"""Durable files: written past the page cache, digested as they go, on the disk when the call returns; read the same way.

Plain writes followed by fsync pass every byte through the page cache, which doubles the memory and, on a machine that
has not used it yet, costs several times the disk's own time. So a file is cut into chunks of 16 MiB that two threads
copy, digest and write with direct I/O from buffers of their own. Where a file system refuses direct I/O (tmpfs, some
network mounts) the same calls go through the cache. Digests are per chunk of the *file*, so that they cover headers
and padding as well and any number of threads can make and check them; and per tensor, so that damage has a name.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from tensorkeep.storage.layout import FileLayout, Fixed, Slot

CHUNK = 16 << 20  # bytes; what a digest in the manifest covers
DISK_BLOCK = 4096  # bytes; what direct I/O asks offsets, lengths and memory to be multiples of
CACHED = 1 << 20  # bytes copied, digested and looked through before the next: stays in a core's cache
SMALL = 4 << 20  # bytes; below this the page cache is quicker
_WRITERS, _READERS = 2, 4  # threads: one copies and digests while the other's write is under way

Bytes = Callable[[str], memoryview]  # the raw bytes of a tensor by name


class Written(NamedTuple):
    """A file on the disk: its size, the xxh3_128 of each chunk and of each tensor, tensors with NaN or Inf in them."""

    size: int
    chunks: list[str]
    tensors: dict[str, str]
    unsound: list[str]


class Piece(NamedTuple):
    """Bytes of one chunk: where they go in it, how many, and whose they are (`name` is None for fixed bytes)."""

    at: int
    length: int
    name: str | None
    start: int  # in the tensor, or in `fixed`
    fixed: bytes = b""


def allocate(size: int) -> memoryview:
    """Page-aligned memory of `size` bytes, rounded up to whole blocks; untouched pages cost nothing.

    Huge pages are not asked for: where memory is in pieces the kernel stops to gather them (seconds a gigabyte).
    """
    return memoryview(mmap.mmap(-1, max(padded(size), DISK_BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def padded(size: int) -> int:
    return -(-size // DISK_BLOCK) * DISK_BLOCK


def digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def chunk_pieces(layout: FileLayout) -> list[list[Piece]]:
    """What lies in each chunk of a file, in order.

    >>> [[piece.length for piece in chunk] for chunk in pieces(FileLayout("f", [Fixed(0, b"abc"), Slot(3, CHUNK, "w")]))]
    [[3, 16777213], [3]]
    """
    chunks: list[list[Piece]] = [[] for _ in range(-(-layout.size // CHUNK))]
    for segment in layout.segments:
        if isinstance(segment, Fixed):
            name, length, fixed = None, len(segment.data), segment.data
        else:
            assert isinstance(segment, Slot), "files with trailers are written by `convert`"
            name, length, fixed = segment.tensor, segment.nbytes, b""
        done = 0
        while done < length:
            chunk, at = divmod(segment.start + done, CHUNK)
            take = min(length - done, CHUNK - at)
            chunks[chunk].append(Piece(at, take, name, done, fixed))
            done += take
    return chunks


def copy(target: memoryview, source: memoryview | bytes) -> None:
    """memcpy that lets other threads run (a slice assignment of a memoryview would not)."""
    import numpy as np  # not at the top: `inspect` reads manifests, and needs no numpy for it

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


# -- writing ------------------------------------------------------------------------------------------------------


def write_file(
    path: Path, layout: FileLayout, source: Bytes | memoryview, floats: Mapping[str, str] | None = None
) -> Written:
    """Write a new file and fsync it; its folder is the caller's to fsync. Nothing is retried after a failed fsync.

    `source` gives each tensor's bytes, or is the image of the whole file (from `allocate`, filled in by `staging`),
    which is then written without another copy. `floats`: dtypes by name of the tensors to look through for NaN and Inf.
    Raises OSError as the system gives it.
    """
    plan = _Plan(layout, source, floats or {})
    handle = open_handle(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, direct=layout.size >= SMALL)
    try:
        if layout.size >= SMALL:  # its full length at once, so that writes may overlap; fallocate measured slower
            os.ftruncate(handle, padded(layout.size))
        _together(min(_WRITERS, len(plan.chunks)), lambda: _write_some(handle, plan), plan.stop)
        os.ftruncate(handle, layout.size)
        os.fsync(handle)
    finally:
        os.close(handle)
    for slot in layout.slots:
        plan.digests.setdefault(slot.tensor, xxhash.xxh3_128())  # empty tensors
    digests = {slot.tensor: plan.digests[slot.tensor].hexdigest() for slot in layout.slots}
    return Written(layout.size, plan.found, digests, sorted(plan.unsound))


def write_small(path: Path, data: bytes) -> Written:
    """Write a small new file whole and fsync it."""
    return write_file(path, FileLayout(path.name, [Fixed(0, data)]), lambda _: memoryview(b""))


class _Plan:
    """One file on its way. Chunks are filled one after the other, so that digests run on from chunk to chunk; while one
    thread fills, the others' writes are under way."""

    def __init__(self, layout: FileLayout, source: Bytes | memoryview, floats: Mapping[str, str]) -> None:
        self.size, self.source, self.floats = layout.size, source, floats
        self.chunks = chunk_pieces(layout)
        self.found: list[str] = []
        self.digests: dict[str, Any] = {}
        self.unsound: set[str] = set()
        self._turn = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def next(self, room: memoryview | None) -> tuple[int, memoryview] | None:
        """Where the next chunk goes in the file, and its bytes padded to whole blocks; None at the end."""
        with self._turn:
            chunk = len(self.found)
            if self._stopped or chunk == len(self.chunks):
                return None
            start, length = chunk * CHUNK, min(CHUNK, self.size - chunk * CHUNK)
            if room is None:
                assert isinstance(self.source, memoryview)
                data = self.source[start : start + padded(length)]
            else:
                data = room[: padded(length)]
                data[length:] = bytes(len(data) - length)
            whole = xxhash.xxh3_128()
            for piece in self.chunks[chunk]:
                self._pass(piece, data, whole)
            self.found.append(whole.hexdigest())
            return start, data

    def _pass(self, piece: Piece, data: memoryview, whole: Any) -> None:
        """Copy, digest and look through one piece, a cache's worth at a time: memory is read once."""
        copied = not isinstance(self.source, memoryview)
        own = memoryview(piece.fixed) if piece.name is None or not copied else self.source(piece.name)  # type: ignore[operator]
        running = self.digests.setdefault(piece.name, xxhash.xxh3_128()) if piece.name is not None else None
        dtype = self.floats.get(piece.name) if piece.name is not None else None
        for at in range(0, piece.length, CACHED):
            length = min(CACHED, piece.length - at)
            target = data[piece.at + at : piece.at + at + length]
            if copied:
                copy(target, own[piece.start + at : piece.start + at + length])
            whole.update(target)
            if running is not None:
                running.update(target)
            if dtype is not None and piece.name is not None and not all_finite(target, dtype):
                self.unsound.add(piece.name)


def _write_some(handle: int, plan: _Plan) -> None:
    room = None if isinstance(plan.source, memoryview) else allocate(min(CHUNK, plan.size))
    while (part := plan.next(room)) is not None:
        _write_all(handle, part[1], part[0])


def _write_all(handle: int, data: memoryview, start: int) -> None:
    done, through_cache = 0, False
    while done < len(data):
        try:
            done += os.pwrite(handle, data[done:], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or through_cache:
                raise
            through_cache = _go_through_cache(handle)


def open_handle(path: Path, flags: int, direct: bool) -> int:
    """A handle, for direct I/O where that is asked for and the file system has it."""
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if flags & os.O_CREAT and os.path.lexists(path):  # some kernels make the file before they refuse
                path.unlink()
    return os.open(path, flags | os.O_CLOEXEC, 0o644)


def _go_through_cache(handle: int) -> bool:
    """No direct I/O on this handle from here on: the file system took the flag and refuses the call."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
    return True


def _together(count: int, work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run `work` in `count` threads (one of them this one) and raise the first error any had."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  carried to the caller's thread and raised there
            errors.append(error)
            stop()

    helpers = [threading.Thread(target=guarded, daemon=True) for _ in range(count - 1)]
    for helper in helpers:
        helper.start()
    guarded()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


# -- NaN and Inf --------------------------------------------------------------------------------------------------

# dtype -> bytes an element, the bits of infinity (of the least NaN where there is no infinity)
_INFINITY = {
    "F64": (8, 0x7FF0 << 48),
    "F32": (4, 0x7F80 << 16),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
    "C64": (4, 0x7F80 << 16),
}
_ONLY_NAN = {"F8_E4M3FNUZ": 0x80, "F8_E5M2FNUZ": 0x80, "F8_E8M0": 0xFF}


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether raw little-endian floats hold neither NaN nor Inf; at memory speed, without a temporary.

    Read as integers, every NaN and Inf is larger than any finite value of its sign: two maxima tell.
    """
    import numpy as np

    if not len(data):
        return True
    if dtype in _ONLY_NAN:
        return not bool((np.frombuffer(data, np.uint8) == _ONLY_NAN[dtype]).any())
    if dtype not in _INFINITY:
        return True
    width, infinity = _INFINITY[dtype]
    sign = 1 << (8 * width - 1)
    positive = int(np.frombuffer(data, f"<i{width}").max())
    return positive < infinity and int(np.frombuffer(data, f"<u{width}").max()) < sign | infinity


# -- reading ------------------------------------------------------------------------------------------------------


def read_file(path: Path, size: int, digests: Sequence[str], image: memoryview | None = None) -> list[int]:
    """Read a file of `size` bytes and compare every chunk; gives the chunks that differ.

    What lies in the page cache is taken from there, the rest is read past it at the disk's speed: a direct read of
    cached pages would have to write them back and drop them first.

    `image` (from `allocate`) receives the bytes; without one they are compared and forgotten. A file that ends early
    differs from there on. Raises OSError as the system gives it.
    """
    handle = open_handle(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, direct=size >= SMALL)
    cached = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    turn, wrong = iter(range(len(digests))), []
    lock = threading.Lock()

    def some() -> None:
        room = allocate(min(CHUNK, size)) if image is None else None
        while True:
            with lock:
                chunk = next(turn, None)
            if chunk is None:
                return
            start, length = chunk * CHUNK, min(CHUNK, size - chunk * CHUNK)
            target = (
                image[start : start + padded(length)]
                if image is not None
                else (room or memoryview(b""))[: padded(length)]
            )
            got = length if _from_cache(cached, target[:length], start) else _read_all(handle, target, start, length)
            if got != length or digest(target[:length]) != digests[chunk]:
                wrong.append(chunk)

    def stop() -> None:
        nonlocal turn
        turn = iter(range(0))

    try:
        _together(max(1, min(_READERS, len(digests))), some, stop)
    finally:
        os.close(handle)
        os.close(cached)
    return sorted(wrong)


def _from_cache(handle: int, target: memoryview, start: int) -> bool:
    """Fill `target` from the page cache; False where some of it is not there, or the file system cannot say."""
    try:
        return os.preadv(handle, [target], start, os.RWF_NOWAIT) == len(target)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False


def _read_all(handle: int, target: memoryview, start: int, length: int) -> int:
    done, through_cache = 0, False
    while done < length:
        try:
            got = os.preadv(handle, [target[done:]], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or through_cache:
                raise
            through_cache = _go_through_cache(handle)
            continue
        if got == 0:
            break
        done += got
    return done
