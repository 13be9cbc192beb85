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
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from tensorkeep.errors import TensorkeepError

TEMPORARY = ".tensorkeep-tmp"
# a lone file (a .pth, a .safetensors) has no folder for its certificate: it lies beside under this ending
CERTIFICATE = "tensorkeep.json"


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


class LocalFolder:
    """A folder on this machine, read with pread: no mapping, so that memory stays what the caller holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        with explained(self.path):
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.is_dir())

    def _open(self, name: str) -> int:
        with self._lock:
            handle = self._handles.get(name)
            if handle is None:
                path = self.path / inside(name, self.url)
                with explained(path):
                    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not hang us
                    if not stat.S_ISREG(os.fstat(handle).st_mode):
                        os.close(handle)
                        raise TensorkeepError("is not a regular file", where=path)
                self._handles[name] = handle
            return handle

    def size(self, name: str) -> int:
        return os.fstat(self._open(name)).st_size

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        size = self.size(name)
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise short_file(self.path / name, start, length, size)
        buffer = bytearray(length)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        handle, done = self._open(name), 0
        with explained(self.path / name):
            while done < len(buffer):
                got = os.preadv(handle, [buffer[done:]], start + done)
                if got == 0:
                    raise short_file(self.path / name, start, len(buffer), start + done)
                done += got

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def __del__(self) -> None:
        self.close()


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
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise TensorkeepError(
            f"the metadata points outside the checkpoint folder: {name!r}",
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
        if error.errno == errno.ENOSPC:
            raise TensorkeepError(
                "the disk is full", where=path, hint="free space or write to another disk; nothing was changed"
            ) from None
        if error.errno == errno.EROFS:
            raise TensorkeepError("the file system is read-only", where=path, hint="write somewhere else") from None
        raise TensorkeepError(f"{error.strerror or error}", where=path) from None


# -- writing ------------------------------------------------------------------------------------------------------


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Stop before any work when `final` is taken. An empty folder counts as free."""
    if not overwrite and os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        raise TensorkeepError(
            "exists already", where=final, hint="choose another path, or add --overwrite (the old one stays until the new one is proven)"
        )


@contextlib.contextmanager
def replacing(final: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `final`; on a clean exit put it in place, on any other remove it.

    The body writes there (a file, or a folder with its files) and proves what it wrote. Every file and folder is
    fsynced before the rename, the parent after it. `final` is never seen half-written.

    Raises TensorkeepError where `final` exists and `overwrite` is not set, or the disk fails.
    """
    refuse_existing(final, overwrite)
    parent = final.parent
    with explained(parent):
        parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{final.name}.{secrets.token_hex(4)}{TEMPORARY}"
    try:
        yield temporary
        sync_tree(temporary)
        with explained(final):
            _put_in_place(temporary, final, overwrite)
            sync_folder(parent)
    finally:
        remove(temporary)


def _put_in_place(temporary: Path, final: Path, overwrite: bool) -> None:
    if not os.path.lexists(final) or (temporary.is_file() and final.is_file() and overwrite):
        _rename(temporary, final, overwrite)
        return
    refuse_existing(final, overwrite)  # somebody may have come between
    if final.is_dir() and not final.is_symlink() and not any(final.iterdir()):
        final.rmdir()
        temporary.rename(final)
        return
    old = final.parent / f".{final.name}.{secrets.token_hex(4)}.old{TEMPORARY}"
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    remove(old)


def _rename(temporary: Path, final: Path, overwrite: bool) -> None:
    if overwrite or temporary.is_dir():
        temporary.replace(final)
    else:
        os.link(temporary, final)  # link refuses a name that is taken; rename would replace it
        temporary.unlink()


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
    with explained(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


sync_folder = sync_file  # the same calls: a folder opens read-only and fsyncs like a file


def remove(path: Path) -> None:
    """Delete a file or tree if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole; the caller's `replacing` makes it durable."""
    with explained(path), path.open("xb") as file:
        file.write(data)


def left_over(folder: Path) -> list[str]:
    """Temporary names an interrupted write left in a folder (F01)."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(TEMPORARY)) if folder.is_dir() else []
