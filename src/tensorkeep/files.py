"""Files: ranged reads, and writes that are there whole or not at all.

A sink is written under a temporary name beside its place, every file and folder fsynced, proven by the caller, and
only then renamed. What stood there before goes away last. Left-over temporary names end in TEMPORARY and are
findings (F01), never read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from tensorkeep.errors import TensorkeepError, shown

TEMPORARY = ".tensorkeep-tmp"
# a lone file (a .pth, a .safetensors) has no folder for its certificate: it lies beside under this ending
CERTIFICATE = "tensorkeep.json"
OPEN_FILES = 64  # kept open per folder: checkpoints have thousands of shards, a process often 1024 handles


class Folder(Protocol):
    """Where the files of one checkpoint lie: a local folder, or a remote prefix."""

    url: str

    def names(self) -> list[str]:
        """Files directly inside, sorted."""
        ...

    def size(self, name: str) -> int: ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes: ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start`; a short file is an error."""
        ...

    def changed(self) -> list[str]:
        """Files that are not what they were when first read (size or time), sorted."""
        ...


class LocalFolder:
    """A folder on this machine, read with pread: no mapping, so that memory stays what the caller holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, int] = OrderedDict()  # open and unused, the longest unused first
        self._busy: dict[str, tuple[int, int]] = {}  # open and read now: handle, readers
        self._first: dict[str, tuple[int, int, int]] = {}  # inode, size, time of change when first opened

    def names(self) -> list[str]:
        with explained(self.path), os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    @contextlib.contextmanager
    def _handle(self, name: str) -> Iterator[int]:
        """An open handle that stays open for the body, however many others are wanted meanwhile."""
        with self._lock:
            handle, readers = self._busy.get(name, (-1, 0))
            if not readers:
                handle = self._idle.pop(name) if name in self._idle else self._open(name)
            self._busy[name] = (handle, readers + 1)
        try:
            yield handle
        finally:
            with self._lock:
                handle, readers = self._busy.pop(name)
                if readers > 1:
                    self._busy[name] = (handle, readers - 1)
                else:
                    self._idle[name] = handle
                while len(self._idle) > OPEN_FILES:
                    os.close(self._idle.popitem(last=False)[1])

    def _open(self, name: str) -> int:
        path = self.path / inside(name, self.url)
        with explained(path):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hang us
        state = os.fstat(handle)
        first = self._first.setdefault(name, _state(state))
        if not stat.S_ISREG(state.st_mode) or first != _state(state):
            os.close(handle)
            if stat.S_ISREG(state.st_mode):
                raise TensorkeepError("changed while it was read", where=path, hint="wait until its writer is done, then run again")
            raise TensorkeepError("is not a regular file", where=path, hint="a checkpoint holds plain files only")
        return handle

    def size(self, name: str) -> int:
        if name not in self._first:
            with self._handle(name):
                pass
        return self._first[name][1]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        size = self.size(name)
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise short_file(self.path / name, start, length, size)
        buffer = bytearray(length)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        done = 0
        with self._handle(name) as handle, explained(self.path / name):
            while done < len(buffer):
                got = os.preadv(handle, [buffer[done:]], start + done)
                if got == 0:
                    raise short_file(self.path / name, start, len(buffer), start + done)
                done += got

    def changed(self) -> list[str]:
        return sorted(name for name, first in self._first.items() if _state_of(self.path / name) != first)

    def close(self) -> None:
        with self._lock:
            while self._idle:
                os.close(self._idle.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        return _state(path.stat())
    except OSError:
        return None


def refuse_changed(folder: Folder) -> None:
    """Stop where a source was written to while it was read: what came out of it would be a mixture."""
    changed = folder.changed()
    if changed:
        raise TensorkeepError(
            f"changed while it was read: {', '.join(changed[:3])}", where=folder.url,
            hint="wait until its writer is done, then run again",
        )  # fmt: skip


def short_file(where: object, start: int, length: int, size: int) -> TensorkeepError:
    """The error for a byte range that ends beyond its file (F02)."""
    return TensorkeepError(
        f"truncated: bytes {start}..{start + length} are asked for, the file ends at {size}",
        where=where,
        code="F02",
        hint="copy or download the file again",
    )


def inside(name: str, where: object) -> str:
    """`name` if it stays in its folder; F06 otherwise. Names come out of untrusted metadata."""
    path = PurePosixPath(name)
    odd = not path.parts or "\0" in name or "\\" in name or any("\ud800" <= letter <= "\udfff" for letter in name)
    if odd or path.is_absolute() or ".." in path.parts:
        raise TensorkeepError(
            f"the metadata points outside the checkpoint folder: {shown(name)}",
            where=where,
            code="F06",
            hint="do not load this checkpoint; get it again from a source you trust",
        )
    return name


@contextlib.contextmanager
def explained(path: object) -> Iterator[None]:
    """Turn the operating system's errors into one that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise TensorkeepError("no such file or folder", where=path, hint="check the path", code="F05") from None
    except PermissionError:
        raise TensorkeepError("permission denied", where=path, hint="check who owns it and its mode") from None
    except NotADirectoryError:
        raise TensorkeepError("is not a folder", where=path) from None
    except OSError as error:
        what, hint = _SPOKEN.get(error.errno or 0, (error.strerror or str(error), None))
        raise TensorkeepError(what, where=path, hint=hint) from None


_SPOKEN = {
    errno.EEXIST: ("exists already, and is no folder to write into", "choose another path"),
    errno.ENOTEMPTY: ("exists already", "choose another path, or add --overwrite"),
    errno.ENOSPC: ("the disk is full", "free space or write to another disk; nothing was changed"),
    errno.EDQUOT: ("the disk quota is used up", "free space or write to another disk; nothing was changed"),
    errno.EFBIG: ("the file is larger than is allowed here", "see ulimit -f, or write smaller shards (--shard-size)"),
    errno.EROFS: ("the file system is read-only", "write somewhere else"),
    errno.EIO: ("the disk failed (input/output error)", "check the disk: dmesg, smartctl"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n 4096"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "choose a shorter one"),
}  # fmt: skip


# -- writing ------------------------------------------------------------------------------------------------------


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Stop before any work when `final` is taken. An empty folder counts as free; a link to a folder never does."""
    with explained(final):
        if final.is_symlink() and final.is_dir():
            raise TensorkeepError(
                f"is a symbolic link to {final.readlink()}", where=final, hint="name that folder itself, or remove the link"
            )
        if not overwrite and os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
            raise TensorkeepError(
                "exists already", where=final,
                hint="choose another path, or add --overwrite (the old one stays until the new one is proven)",
            )  # fmt: skip


@contextlib.contextmanager
def replacing(final: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `final`; on a clean exit put it in place, on any other remove it.

    The body writes there (a file, or a folder with its files) and proves what it wrote. Every file and folder is
    fsynced before the rename, the parent after it. `final` is never seen half-written.

    Raises TensorkeepError where `final` exists and `overwrite` is not set, or the disk fails.

    >>> with replacing(Path("model.pth"), overwrite=False) as temporary:        # doctest: +SKIP
    ...     write_bytes(temporary, data)
    """
    with replacing_all([final], [overwrite]) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def replacing_all(finals: Sequence[Path], overwrite: Sequence[bool]) -> Iterator[list[Path]]:
    """`replacing` for several paths: where one cannot be put in place, those before it go back to what they were."""
    finals = [_named(final) for final in finals]
    for final, may in zip(finals, overwrite):
        refuse_existing(final, may)
        with explained(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
    temporaries = [temporary_name(final) for final in finals]
    undo: list[Callable[[], None]] = []
    try:
        yield temporaries
        for temporary in temporaries:
            sync_tree(temporary)
        try:
            for temporary, final, may in zip(temporaries, finals, overwrite):
                with explained(final):
                    undo.append(_put_in_place(temporary, final, may))
            for parent in {final.parent for final in finals}:
                sync_folder(parent)
        except BaseException:
            for back in reversed(undo):
                with contextlib.suppress(OSError):
                    back()
            raise
    finally:
        for temporary in temporaries:
            remove(temporary)  # after a success this is what stood in place before


def temporary_name(final: Path) -> Path:
    """A fresh name beside `final`, never longer than a file system takes."""
    return final.with_name(f".{final.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}")


def _named(final: Path) -> Path:
    """`final` by a name of its own, which `.` and `x/..` lack; a link at its end stays a link."""
    with explained(final):
        final = final.resolve() if final.name in ("", "..") else final.parent.resolve() / final.name
    if not final.name:
        raise TensorkeepError("is the root folder", where=final, hint="name a folder in it")
    return final


def _put_in_place(temporary: Path, final: Path, overwrite: bool) -> Callable[[], None]:
    """Rename `temporary` to `final`; what stood there takes its name. Gives back the way to undo that."""
    refuse_existing(final, overwrite)  # somebody may have come between
    if os.path.lexists(final) and not (final.is_dir() and temporary.is_dir() and not any(final.iterdir())):
        exchange(temporary, final)
        return lambda: exchange(temporary, final)
    if temporary.is_dir():
        temporary.rename(final)  # refuses a folder that is not empty, replaces an empty one
        return lambda: _rename(final, temporary)
    _link(temporary, final)
    return final.unlink


def _rename(one: Path, other: Path) -> None:
    one.rename(other)


def _link(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)  # link refuses a name that is taken; rename would replace it
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        temporary.rename(final)  # a file system without hard links (FAT, some network mounts)


_RENAME_EXCHANGE = 2  # linux/fs.h


def exchange(one: Path, other: Path) -> None:
    """Swap two names. In one step where the kernel and the file system can, so that a kill at any instant leaves both."""
    import ctypes

    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None:
        here = -100  # AT_FDCWD; the paths are absolute
        if swap(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise OSError(number, os.strerror(number), str(other))
    aside = temporary_name(other)
    other.rename(aside)
    try:
        one.rename(other)
        try:
            aside.rename(one)
        except BaseException:
            other.rename(one)
            raise
    except BaseException:
        aside.rename(other)
        raise


def sync_tree(path: Path) -> None:
    """fsync a file, or every file and folder of a tree."""
    if path.is_file():
        sync_file(path)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def sync_file(path: Path) -> None:
    """fsync; a failure is fatal, since the kernel may have dropped the pages and would not say so twice."""
    with explained(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


sync_folder = sync_file  # the same calls: a folder opens read-only and fsyncs like a file


def remove(path: Path) -> None:
    """Delete a file or tree if it is there. What cannot be deleted stays: it bears a temporary name (F01)."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole; the caller's `replacing` makes it durable."""
    with explained(path), path.open("xb") as file:
        file.write(data)


def left_over(folder: Path) -> list[str]:
    """Temporary names an interrupted write left in a folder (F01)."""
    with explained(folder):
        return sorted(p.name for p in folder.iterdir() if p.name.endswith(TEMPORARY)) if folder.is_dir() else []
