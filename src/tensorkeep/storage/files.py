"""Files as byte ranges, file names that must stay in their folder, and the system's errors in plain words.

Temporary names end in TEMPORARY (`placement` makes them); left over, they are findings (F01) and never read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from tensorkeep.errors import TensorkeepError, near_misses, printable, shown

TEMPORARY = ".tensorkeep-tmp"
# a lone file (a .pth, a .safetensors) has no folder for its certificate: it lies beside under this ending
CERTIFICATE = "tensorkeep.json"
OPEN_FILES = 64  # kept open per folder: checkpoints have thousands of shards, a process often 1024 handles
Progress = Callable[[str, int, int], None]  # called with what is being done, bytes done, bytes in all


class Folder(Protocol):
    """Where the files of one checkpoint lie: a local folder, or a prefix in an object store.

    `url` is the path or URL as messages show it.
    """

    url: str

    def names(self) -> list[str]:
        """List the files directly inside, sorted."""
        ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of a file from byte `start`, to its end where `length` is None.

        A short file is an error.
        """
        ...

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file; a short file is an error."""
        ...

    def changed(self) -> list[str]:
        """List the files that are not what they were when first read (by size or time), sorted."""
        ...


class LocalFolder:
    """A folder on this machine, as a `Folder`.

    Files are read with pread and not mapped, so that memory stays what the caller holds. A file's state is remembered
    when it is first opened; one that has changed since is refused (TensorkeepError).

    Args:
        path: the folder.

    Example:
        >>> LocalFolder(Path("/models/llama")).read("config.json")           # doctest: +SKIP
        b'{"model_type": "llama", ...'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, int] = OrderedDict()  # open and unused, the longest unused first
        self._busy: dict[str, tuple[int, int]] = {}  # open and read now: handle, readers
        self._first: dict[str, tuple[int, int, int]] = {}  # inode, size, time of change when first opened

    def names(self) -> list[str]:
        """List the files directly inside, sorted."""
        with explained(self.path), os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    @contextlib.contextmanager
    def _handle(self, name: str) -> Iterator[int]:
        """Lend an open handle, which stays open for the body however many other files are wanted meanwhile."""
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
        """Open a regular file that has not changed since it was first opened."""
        path = self.path / inside(name, self.url)
        with explained(path):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hang us
        state = os.fstat(handle)
        first = self._first.setdefault(name, _state(state))
        if not stat.S_ISREG(state.st_mode) or first != _state(state):
            os.close(handle)
            if stat.S_ISREG(state.st_mode):
                raise TensorkeepError(
                    "changed while it was read", where=path, hint="wait until its writer is done, then run again"
                )
            what = "is a folder, not a regular file" if stat.S_ISDIR(state.st_mode) else "is not a regular file"
            raise TensorkeepError(what, where=path, hint="name a plain file")
        return handle

    def size(self, name: str) -> int:
        """Return the size in bytes that a file had when it was first opened."""
        if name not in self._first:
            with self._handle(name):
                pass
        return self._first[name][1]

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes of a file from byte `start`; F02 where it is shorter."""
        size = self.size(name)
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise short_file(self.path / name, start, length, size)
        buffer = bytearray(length)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of a file; F02 where it is shorter."""
        done = 0
        with self._handle(name) as handle, explained(f"{self.url}/{name}"):
            while done < len(buffer):
                got = os.preadv(handle, [buffer[done:]], start + done)
                if got == 0:
                    raise short_file(self.path / name, start, len(buffer), start + done)
                done += got

    def changed(self) -> list[str]:
        """List the files that are not what they were when first opened (inode, size or time), sorted."""
        return sorted(name for name, first in self._first.items() if _state_of(self.path / name) != first)

    def close(self) -> None:
        """Close the handles that nobody uses."""
        with self._lock:
            while self._idle:
                os.close(self._idle.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _state(found: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was written to or replaced: inode, size in bytes, time of change in nanoseconds."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        return _state(path.stat())
    except OSError:
        return None


def refuse_changed(folder: Folder) -> None:
    """Raise where a source was written to while it was read: what came out of it would be a mixture.

    Args:
        folder: the source, after the last byte was read.

    Raises:
        TensorkeepError: it names the first files that changed.
    """
    changed = folder.changed()
    if changed:
        raise TensorkeepError(
            f"changed while it was read: {', '.join(changed[:3])}",
            where=folder.url,
            hint="wait until its writer is done, then run again",
        )


def short_file(where: object, start: int, length: int, size: int) -> TensorkeepError:
    """Return the error for a byte range that ends beyond its file (F02).

    Args:
        where: the file.
        start: first byte asked for.
        length: bytes asked for.
        size: bytes that the file has.
    """
    return TensorkeepError(
        f"truncated: bytes {start}..{start + length} are asked for, the file ends at {size}",
        where=where,
        code="F02",
        hint="copy or download the file again",
    )


def inside(name: str, where: object) -> str:
    """Return a file name from untrusted metadata if it stays inside its folder.

    Args:
        name: the name, relative to the folder.
        where: the metadata file, for messages.

    Returns:
        `name` itself.

    Raises:
        TensorkeepError: F06 where it is absolute, climbs with `..`, or is no plain text.
    """
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


def spelled_plainly(name: str, folder: Path) -> bool:
    """Tell whether a name is spelled in its one way (no `.`, no `//`) and leads through no link.

    Args:
        name: relative to `folder`; `inside` has accepted it.
        folder: a local folder.

    Example:
        >>> spelled_plainly("a.bin", Path()), spelled_plainly("b/./a.bin", Path())
        (True, False)
    """
    within = PurePosixPath(name)
    return str(within) == name and (folder / within.parent).resolve() == folder.resolve() / within.parent


def local_path(given: str | Path) -> Path:
    """Return a path that somebody typed as a Path, `~` expanded.

    Args:
        given: the path; it need not exist.

    Raises:
        TensorkeepError: the system could never open such a path.
    """
    try:
        path = Path(given).expanduser()
        path.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.lstat()
    except (ValueError, RuntimeError, OSError) as error:  # NUL, surrogates, no such user, a loop of links, too long
        raise TensorkeepError(f"is no path that can be opened: {error}", where=given, hint="check the path") from None
    return path


def open_plain(path: Path, flags: int) -> int:
    """Open a regular file that is no link; whatever a link would lead to is not touched.

    Args:
        path: the file.
        flags: of os.open; with O_CREAT the file is made where there is none.

    Returns:
        The open file descriptor; the caller closes it.

    Raises:
        TensorkeepError: it is a symbolic link, no regular file, or to be written and the same file as another name.
        OSError: as the system gives it.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if not path.is_symlink():
            raise
        what = f"is a symbolic link to {printable(str(path.readlink()))}"
        raise TensorkeepError(what, where=path, hint="links are not followed here: remove it") from error
    state = os.fstat(handle)
    what = "" if stat.S_ISREG(state.st_mode) else "is not a regular file"
    if state.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
        what = "is the same file as another name (a hard link), which would be written to"
    if what:
        os.close(handle)
        raise TensorkeepError(what, where=path, hint="move it away")
    return handle


def absent(path: object) -> TensorkeepError:
    """Return the error for a path that is not there (F05), with names beside it that are spelled like it.

    Args:
        path: as it was given.
    """
    name, beside = Path(str(path)).name, list[str]()
    with contextlib.suppress(OSError, ValueError), os.scandir(Path(str(path)).parent) as entries:
        beside = [printable(entry.name) for entry in itertools.islice(entries, 1000)]
    hint = near_misses(name, beside) or "check the path"
    return TensorkeepError("no such file or folder", where=path, hint=hint, code="F05")


@contextlib.contextmanager
def explained(path: object) -> Iterator[None]:
    """Turn the system's errors in the body into a TensorkeepError that says what to do.

    Args:
        path: the file or folder that the body works on, for messages.

    Yields:
        Nothing.

    Raises:
        TensorkeepError: for every OSError of the body; F05 where the file is not there.
    """
    try:
        yield
    except FileNotFoundError:
        raise absent(path) from None
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
}


def left_over(folder: Path) -> list[str]:
    """Return the temporary names that an interrupted write left in a folder (F01), sorted.

    Args:
        folder: the folder to look into; one that does not exist has none.
    """
    with explained(folder):
        return sorted(p.name for p in folder.iterdir() if p.name.endswith(TEMPORARY)) if folder.is_dir() else []


def damaged(where: object, names: Sequence[str]) -> TensorkeepError:
    """Return the error for bytes that are not what was written (F03).

    Args:
        where: the file.
        names: the tensors that are damaged.
    """
    first = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return TensorkeepError(
        f"damaged since it was written: {first}",
        where=where,
        code="F03",
        hint="copy the checkpoint again from where it is whole",
    )
