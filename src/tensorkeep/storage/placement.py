"""Put a file or folder in its place whole or not at all.

It is written under a temporary name beside its place, every file and folder fsynced, proven by the caller, and only
then renamed. What stood there before goes away last, and comes back where anything fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import TEMPORARY, explained


def refuse_existing(final: Path, overwrite: bool) -> None:
    """Raise before any work is done where the place is taken.

    An empty folder counts as free; a link to a folder never does.

    Args:
        final: the path to be written.
        overwrite: whether what stands there may be replaced.

    Raises:
        TensorkeepError: it exists and `overwrite` is not set, or it is a link to a folder.
    """
    with explained(final):
        if final.is_symlink() and final.is_dir():
            raise TensorkeepError(
                f"is a symbolic link to {final.readlink()}",
                where=final,
                hint="name that folder itself, or remove the link",
            )
        if not overwrite and os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
            raise TensorkeepError(
                "exists already",
                where=final,
                hint="choose another path, or add --overwrite (the old one stays until the new one is proven)",
            )


@contextlib.contextmanager
def replacing(final: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary path beside `final`; put it in place when the body ends well, remove it otherwise.

    The body writes there (a file, or a folder with its files) and proves what it wrote. Every file and folder is
    fsynced before the rename, the parent after it. `final` is never seen half-written.

    Args:
        final: the file or folder to be written.
        overwrite: whether what stands there may be replaced.

    Yields:
        The temporary path, which does not exist yet.

    Raises:
        TensorkeepError: `final` exists and `overwrite` is not set, or the disk fails.

    Example:
        >>> with replacing(Path("model.pth"), overwrite=False) as temporary:        # doctest: +SKIP
        ...     write_bytes(temporary, data)
    """
    with replacing_all([final], [overwrite]) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def replacing_all(finals: Sequence[Path], overwrite: Sequence[bool]) -> Iterator[list[Path]]:
    """Do what `replacing` does for several paths at once: all are put in place, or all stay as they were.

    Args:
        finals: the files or folders to be written.
        overwrite: for each, whether what stands there may be replaced.

    Yields:
        A temporary path for each.

    Raises:
        TensorkeepError: one of them exists and may not be replaced, or the disk fails.
    """
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
            _sync_tree(temporary)
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
    """Return a fresh temporary name beside `final`, never longer than a file system takes.

    Args:
        final: the path that the temporary one stands for.
    """
    return final.with_name(f".{final.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}")


def _named(final: Path) -> Path:
    """Give `final` a name of its own, which `.` and `x/..` lack; a link at its end stays a link."""
    with explained(final):
        final = final.resolve() if final.name in ("", "..") else final.parent.resolve() / final.name
        here = final.is_dir() and final.samefile(".")
    if here or not final.name:
        what = "is the folder you are in" if here else "is the root folder"
        raise TensorkeepError(what, where=final, hint="name a new folder in it")
    return final


def _put_in_place(temporary: Path, final: Path, overwrite: bool) -> Callable[[], None]:
    """Rename `temporary` to `final` and return the way to undo that; what stood there takes the temporary name."""
    refuse_existing(final, overwrite)  # somebody may have come between
    if os.path.lexists(final) and not (final.is_dir() and temporary.is_dir() and not any(final.iterdir())):
        swap_names(temporary, final)
        return lambda: swap_names(temporary, final)
    if temporary.is_dir():
        temporary.rename(final)  # refuses a folder that is not empty, replaces an empty one
        return lambda: _rename(final, temporary)
    _link(temporary, final)
    return final.unlink


def _rename(one: Path, other: Path) -> None:
    one.rename(other)


def _link(temporary: Path, final: Path) -> None:
    """Give a file its final name, which must be free."""
    try:
        os.link(temporary, final)  # link refuses a name that is taken; rename would replace it
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        temporary.rename(final)  # a file system without hard links (FAT, some network mounts)


_RENAME_EXCHANGE = 2  # linux/fs.h


def swap_names(one: Path, other: Path) -> None:
    """Swap two names, in one step where the kernel can, so that a kill at any instant leaves both.

    Args:
        one: an existing file or folder, as an absolute path.
        other: another one on the same file system.

    Raises:
        OSError: as the system gives it; both names are then what they were.
    """
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


def _sync_tree(path: Path) -> None:
    """Flush a file, or every file and folder of a tree, to the disk."""
    if path.is_file():
        sync_file(path)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def sync_file(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync).

    A failure is final, since the kernel may have dropped the data and would not say so twice.

    Args:
        path: the file, or the folder whose names are to last.

    Raises:
        TensorkeepError: the disk failed.
    """
    with explained(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


sync_folder = sync_file  # the same calls: a folder opens read-only and fsyncs like a file


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it, if it is there; what cannot be deleted stays.

    Args:
        path: a temporary name, so that what stays is reported (F01) and never read.
    """
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small new file whole; the caller's `replacing` makes it durable.

    Args:
        path: the file to make; it must not exist.
        data: its bytes.

    Raises:
        TensorkeepError: the file exists, or the disk fails.
    """
    with explained(path), path.open("xb") as file:
        file.write(data)
