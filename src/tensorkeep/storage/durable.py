"""Write files so that they are on the disk when the call returns, and read them back, digesting all on the way.

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
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import xxhash

from tensorkeep.storage._pieces import Piece, chunk_pieces
from tensorkeep.storage.finite import all_finite
from tensorkeep.storage.layout import FileLayout, Fixed

CHUNK = 16 << 20  # bytes; what a digest in the manifest covers
DISK_BLOCK = 4096  # bytes; what direct I/O asks offsets, lengths and memory to be multiples of
CACHED = 1 << 20  # bytes copied, digested and looked through before the next: stays in a core's cache
SMALL = 4 << 20  # bytes; below this the page cache is quicker
_WRITERS, _READERS = 2, 4  # threads: one copies and digests while the other's write is under way

Bytes = Callable[[str], memoryview]  # the raw bytes of a tensor by name


class Written(NamedTuple):
    """What was written of one file.

    Attributes:
        size: bytes of the file.
        chunks: xxh3_128 of every 16 MiB of it, in hex.
        tensors: tensor name -> xxh3_128 of its bytes, in hex.
        unsound: names of the tensors that hold NaN or Inf, of those that were looked through.
        crcs: tensor name -> CRC-32 of its bytes, where the layout holds such checksums.
    """

    size: int
    chunks: list[str]
    tensors: dict[str, str]
    unsound: list[str]
    crcs: Mapping[str, int] = MappingProxyType({})


def allocate(size: int, kind: type[mmap.mmap] = mmap.mmap) -> memoryview:
    """Get page-aligned memory for direct I/O; pages that are never touched cost nothing.

    Huge pages are not asked for: where memory is in pieces the kernel stops to gather them (seconds per gigabyte).

    Args:
        size: bytes wanted; rounded up to whole blocks of 4096.
        kind: the class of the mapping; the view's `obj` is of it.

    Returns:
        Writable memory of at least `size` bytes, filled with zeros.
    """
    return memoryview(kind(-1, max(padded(size), DISK_BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks of direct I/O, 4096 bytes each.

    Args:
        size: number of bytes.

    Example:
        >>> padded(1), padded(4096)
        (4096, 4096)
    """
    return -(-size // DISK_BLOCK) * DISK_BLOCK


def digest(data: bytes | memoryview) -> str:
    """Return the xxh3_128 of some bytes, in hex.

    Args:
        data: the bytes.

    Example:
        >>> len(digest(b"abc"))
        32
    """
    return xxhash.xxh3_128(data).hexdigest()


def copy(target: memoryview, source: memoryview | bytes) -> None:
    """Copy memory and let other threads run meanwhile, which slice assignment of a memoryview does not."""
    import numpy as np  # not at the top: `inspect` reads manifests, and needs no numpy for it

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


# -- writing ------------------------------------------------------------------------------------------------------


def write_file(
    path: Path,
    layout: FileLayout,
    source: Bytes | memoryview,
    floats: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
) -> Written:
    """Write a new file and fsync it; the caller fsyncs its folder.

    Nothing is retried after a failed fsync: the kernel may have dropped the data and not say so twice.

    Args:
        path: the file to make; it must not exist.
        layout: what goes where in it; a trailer stands behind the data that it holds checksums of.
        source: gives each tensor's bytes by name; or the image of the whole file, from `allocate` and filled in, which
            is then written without another copy.
        floats: tensor name -> dtype, of the tensors to look through for NaN and Inf.
        parts: slot -> the tensor that it is a part of, where one has several slots: checksums are of whole tensors.

    Returns:
        Size and digests of what was written.

    Raises:
        OSError: as the system gives it.
    """
    plan = _Plan(layout, source, floats or {}, parts or {})
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
    return Written(layout.size, plan.found, digests, sorted(plan.unsound), plan.crcs)


def write_small(path: Path, data: bytes) -> Written:
    """Write a small new file whole and fsync it; the caller fsyncs its folder.

    Args:
        path: the file to make; it must not exist.
        data: its bytes.

    Returns:
        Its size and digests.

    Raises:
        OSError: as the system gives it.
    """
    return write_file(path, FileLayout(path.name, [Fixed(0, data)]), lambda _: memoryview(b""))


class _Plan:
    """A file on its way to the disk, handed out to the writing threads chunk by chunk.

    Chunks are filled one after the other, so that a tensor's digest runs on from chunk to chunk; while one thread
    fills, the others' writes are under way.
    """

    def __init__(
        self, layout: FileLayout, source: Bytes | memoryview, floats: Mapping[str, str], parts: Mapping[str, str]
    ) -> None:
        self.size, self.source, self.floats, self.parts = layout.size, source, floats, parts
        self.chunks, self.wants_crc = chunk_pieces(layout, CHUNK), layout.wants_crc
        self.crcs: dict[str, int] = {}
        self.found: list[str] = []
        self.digests: dict[str, Any] = {}
        self.unsound: set[str] = set()
        self._turn = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Hand out no more chunks."""
        self._stopped = True

    def next(self, room: memoryview | None) -> tuple[int, memoryview] | None:
        """Fill the next chunk; give its position in the file and its padded bytes, or None at the end."""
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
        """Copy, digest and look through one piece, a cache's worth at a time, so that memory is read once."""
        name = piece.name
        copied = name is None or not isinstance(self.source, memoryview)
        own = memoryview(piece.known(self.crcs)) if name is None else self.source(name) if copied else None  # type: ignore[operator]
        running = self.digests.setdefault(name, xxhash.xxh3_128()) if name is not None else None
        dtype = self.floats.get(name) if name is not None else None
        for at in range(0, piece.length, CACHED):
            length = min(CACHED, piece.length - at)
            target = data[piece.at + at : piece.at + at + length]
            if own is not None:
                copy(target, own[piece.start + at : piece.start + at + length])
            whole.update(target)
            if running is not None:
                running.update(target)
            if self.wants_crc and name is not None:
                tensor = self.parts.get(name, name)
                self.crcs[tensor] = zlib.crc32(target, self.crcs.get(tensor, 0))
            if dtype is not None and name is not None and not all_finite(target, dtype):
                self.unsound.add(name)


def _write_some(handle: int, plan: _Plan) -> None:
    """Write chunks until none is left; the work of one thread."""
    room = None if isinstance(plan.source, memoryview) else allocate(min(CHUNK, plan.size))
    while (part := plan.next(room)) is not None:
        _write_all(handle, part[1], part[0])


def _write_all(handle: int, data: memoryview, start: int) -> None:
    """Write all of `data` at byte `start`, through the page cache where direct I/O is refused."""
    done, through_cache = 0, False
    while done < len(data):
        try:
            done += os.pwrite(handle, data[done:], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL or through_cache:
                raise
            through_cache = _go_through_cache(handle)


def open_handle(path: Path, flags: int, direct: bool) -> int:
    """Open a file, for direct I/O where that is asked for and the file system has it.

    Args:
        path: the file.
        flags: of os.open.
        direct: whether to ask for direct I/O.

    Returns:
        The open file descriptor; the caller closes it.
    """
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
    """Turn direct I/O off on an open handle: the file system took the flag and refuses the call."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
    return True


def _together(count: int, work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run `work` in `count` threads, one of them this one, and raise the first error that any had."""
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


# -- reading ------------------------------------------------------------------------------------------------------


def read_file(path: Path, size: int, digests: Sequence[str], image: memoryview | None = None) -> list[int]:
    """Read a file and compare the digest of every chunk.

    What lies in the page cache is taken from there, the rest is read past it at the disk's speed: a direct read of
    cached pages would have to write them back and drop them first.

    Args:
        path: the file.
        size: bytes it must have; a file that ends early differs from there on.
        digests: xxh3_128 of every chunk of 16 MiB, in hex.
        image: receives the bytes (from `allocate`); without one they are compared and forgotten.

    Returns:
        The numbers of the chunks that differ, sorted; empty where the file is whole.

    Raises:
        OSError: as the system gives it.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
    handle = open_handle(path, flags, direct=size >= SMALL)
    cached = os.open(path, flags)
    turn, wrong, lock = iter(range(len(digests))), list[int](), threading.Lock()

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
    """Fill `target` from the page cache; False where part of it is not there, or the file system cannot say."""
    try:
        return os.preadv(handle, [target], start, os.RWF_NOWAIT) == len(target)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False


def _read_all(handle: int, target: memoryview, start: int, length: int) -> int:
    """Read `length` bytes at byte `start` into `target`; return how many there were."""
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
