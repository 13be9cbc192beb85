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
from tensorkeep.storage.leftovers import BEFORE, KEPT, NAME, dead_names, writing_in
from tensorkeep.storage.overwriting import Kind, refuse_existing
from tensorkeep.storage.signals import held


@contextlib.contextmanager
def replacing(final: Path, overwrite: bool, kind: Kind | None = None) -> Iterator[Path]:
    """Give a temporary path beside `final`; put it in place when the body ends well, remove it otherwise.

    The body writes there (a file, or a folder with its files) and proves what it wrote. Every file and folder is
    fsynced before the rename, the parent after it. `final` is never seen half-written.

    Args:
        final: the file or folder to be written.
        overwrite: whether what stands there may be replaced.
        kind: what it must be to be replaced; None for a run's own file, which is known by its name alone.

    Yields:
        The temporary path, which does not exist yet.

    Raises:
        TensorkeepError: `final` exists and may not be replaced (see `overwriting.refuse_existing`), or the disk fails.

    Example:
        >>> with replacing(Path("model.pth"), overwrite=False) as temporary:        # doctest: +SKIP
        ...     write_bytes(temporary, data)
    """
    with replacing_all([final], [overwrite], [kind]) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def replacing_all(
    finals: Sequence[Path], overwrite: Sequence[bool], kinds: Sequence[Kind | None]
) -> Iterator[list[Path]]:
    """Do what `replacing` does for several paths at once: all are put in place, or all stay as they were.

    Args:
        finals: the files or folders to be written.
        overwrite: for each, whether what stands there may be replaced.
        kinds: for each, what that must be; None for a file that is known by its name alone.

    Yields:
        A temporary path for each.

    Raises:
        TensorkeepError: one of them exists and may not be replaced, or the disk fails.
    """
    finals = [_named(final) for final in finals]
    rules = list(zip(overwrite, kinds, strict=True))
    for final, (may, kind) in zip(finals, rules, strict=True):
        refuse_existing(final, may, kind)
        with explained(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
    temporaries = [temporary_name(final) for final in finals]
    with contextlib.ExitStack() as stack:
        for parent in {final.parent for final in finals}:
            stack.enter_context(writing_in(parent))
        try:
            try:
                yield temporaries
                for temporary in temporaries:
                    _sync_tree(temporary)
                with held():
                    _put_all_in_place(temporaries, finals, rules)
            finally:
                _remove_all(temporaries)  # after a success this is what stood in place before
        finally:
            _remove_all(temporaries)  # a signal may have come just before: one raises, later ones do not


def _remove_all(paths: Sequence[Path]) -> None:
    with held():
        for path in paths:
            remove(path)


def _put_all_in_place(
    temporaries: Sequence[Path], finals: Sequence[Path], rules: Sequence[tuple[bool, Kind | None]]
) -> None:
    """Give every temporary its name; where one fails, all get back what they had."""
    undo: list[Callable[[], None]] = []
    try:
        for temporary, final, (may, kind) in zip(temporaries, finals, rules, strict=True):
            with explained(final):
                undo.append(_put_in_place(temporary, final, may, kind))
        for parent in {final.parent for final in finals}:
            sync_folder(parent)
    except BaseException:
        for back in reversed(undo):
            with contextlib.suppress(OSError):
                back()
        raise


def temporary_name(final: Path, before: bool = False) -> Path:
    """Return a fresh temporary name beside `final`, never longer than a file system takes.

    Args:
        final: the path that the temporary one stands for.
        before: it is for what stands at `final` now; after a kill that is put back and not removed.
    """
    return final.with_name(f".{final.name[:KEPT]}.{secrets.token_hex(4)}{BEFORE if before else ''}{TEMPORARY}")


def clear_leftovers(final: Path) -> tuple[list[str], list[str]]:
    """Clean up after commands that were killed while they wrote beside `final`.

    What was written and never put in place is removed. What stood at `final`, and was moved aside when the kill came,
    gets its name back.

    Args:
        final: the path that is about to be written.

    Returns:
        The names removed or put back, and the names for `final` that stay: a writer may be at work, or they cannot be
        deleted.
    """
    final, done = _named(final), []
    for path in dead_names(final.parent):
        match = NAME.fullmatch(path.name)
        assert match is not None
        if match["old"] and match["sink"] != final.name[:KEPT]:
            continue  # the next command on that sink knows its whole name
        if match["old"] and not os.path.lexists(final):
            with contextlib.suppress(OSError):
                path.rename(final)
        else:
            remove(path)
        done += [] if os.path.lexists(path) else [path.name]
    try:
        here = sorted(p.name for p in final.parent.iterdir())
    except OSError:
        here = []
    return done, [n for n in here if (m := NAME.fullmatch(n)) and m["sink"] == final.name[:KEPT]]


def _named(final: Path) -> Path:
    """Give `final` a name of its own, which `.` and `x/..` lack; a link at its end stays a link."""
    with explained(final):
        final = final.resolve() if final.name in ("", "..") else final.parent.resolve() / final.name
        here = final.is_dir() and final.samefile(".")
    if here or not final.name:
        what = "is the folder you are in" if here else "is the root folder"
        raise TensorkeepError(what, where=final, hint="name a new folder in it")
    return final


def _put_in_place(temporary: Path, final: Path, overwrite: bool, kind: Kind | None) -> Callable[[], None]:
    """Rename `temporary` to `final` and return the way to undo that; what stood there takes the temporary name."""
    refuse_existing(final, overwrite, kind)  # somebody may have come between
    if os.path.lexists(final) and not (final.is_dir() and temporary.is_dir() and not any(final.iterdir())):
        swap_names(temporary, final)
        return lambda: swap_names(temporary, final)
    if temporary.is_dir():
        temporary.rename(final)  # refuses a folder that is not empty, replaces an empty one
        return lambda: _rename(final, temporary)
    put_new(temporary, final)
    return final.unlink


def _rename(one: Path, other: Path) -> None:
    one.rename(other)


def put_new(temporary: Path, final: Path) -> None:
    """Give a file its final name, which must be free.

    Args:
        temporary: the file.
        final: its name to be, on the same file system.

    Raises:
        OSError: as the system gives it; FileExistsError where the name is taken.
    """
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
    aside = temporary_name(other, before=True)
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
