"""Read features out of HDF5 files: one video's, or those of all videos in one file, each under its name.

h5py is no dependency: it is asked for where such a file is met. What lies outside of the file is not followed.
"""

from __future__ import annotations

import contextlib
import math
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained

CONTAINERS = (".h5", ".hdf5")
_MOST = 1000  # datasets of one video that are looked at
_LINKS = 16  # that are followed to one
_LARGE, _PACKED = 1 << 30, 50  # bytes from which on features are looked at, and how well they may be compressed
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError)


def container_of(path: Path) -> Path | None:
    """Return the HDF5 file that a path is, or of FILE.h5/KEY lies in; None where it has nothing to do with one.

    Args:
        path: of a feature file.
    """
    return next((p for p in (path, *path.parents) if p.suffix.lower() in CONTAINERS and not p.is_dir()), None)


def find_members(file: Path, stems: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Find videos in an HDF5 file that holds many.

    Args:
        file: the file.
        stems: what each is called in it.

    Returns:
        stem -> FILE.h5/KEY of those that are there, and the first names that the file has.

    Raises:
        TensorkeepError: The file cannot be read, or h5py is not installed.
    """
    with _opened(file) as opened:
        found = {stem: file / stem for stem in stems if _get(opened, stem, file) is not None}
        return found, sorted(key for key, _ in zip(opened, range(3)))


def open_hdf5(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]]:
    """Open the datasets of one video.

    Args:
        path: the file, or FILE.h5/KEY.

    Returns:
        Name -> shape and what reads the part at an index, of all that are numbers.

    Raises:
        TensorkeepError: There is nothing of that name, or values lie outside of the file.
    """
    file = container_of(path)
    assert file is not None
    with _opened(file) as opened:
        found = _get(opened, path.relative_to(file).as_posix(), file) if path != file else opened
        if found is None:
            raise TensorkeepError("is not in the file", where=path)
        return {name: (_shape(one, file), _taking(file, one.name)) for name, one in _datasets(found)}


def _taking(file: Path, name: str) -> Callable[[Any], Any]:
    """Return what reads a part of a dataset; the file is open while it does, so that any process may call it."""

    def take(index: Any) -> Any:
        with _opened(file) as opened:
            try:
                return opened[name][index]
            except _ERRORS as error:
                raise TensorkeepError(f"{name} cannot be read: {error}", where=file) from error

    return take


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file for reading; what h5py stumbles over in it is told as damage."""
    try:
        import h5py
    except ImportError as error:
        hint = "pip install h5py; or store each video's array as .npy"
        raise TensorkeepError("HDF5 files are read by h5py, which is not installed", where=file, hint=hint) from error
    with explained(file):
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            raise TensorkeepError("is no file", where=file, hint="features are read from files alone")
        file.open("rb").close()
    try:
        with h5py.File(file, "r") as opened:
            yield opened
    except _ERRORS as error:
        raise TensorkeepError(f"is no HDF5 file that can be read: {error}", where=file) from error


def _get(opened: Any, name: str, file: Path) -> Any:
    """Return what a name leads to inside the file, step by step; None where it leads nowhere."""
    import h5py

    here, left, links = opened, list(PurePosixPath(name).parts), 0
    while left:
        part = left.pop(0)
        if part == "/":
            here = opened
            continue
        # h5py's own ways of asking for a name open what it links to
        known = isinstance(here, h5py.Group) and part != ".." and here.id.links.exists(part.encode())
        if not known or links > _LINKS:
            return None
        kind = here.id.links.get_info(part.encode()).type
        if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
            raise TensorkeepError(f"{name} is a link to another file, which is not followed", where=file)
        if kind == h5py.h5l.TYPE_HARD:
            here = here[part]
        else:
            links += 1
            left[:0] = PurePosixPath(here.id.links.get_val(part.encode()).decode(errors="replace")).parts
    return here


def _shape(dataset: Any, file: Path) -> tuple[int, ...]:
    """Return the shape of a dataset whose values lie in the file."""
    if dataset.is_virtual or dataset.external:
        raise TensorkeepError(f"the values of {dataset.name} lie in other files, which are not followed", where=file)
    where, size = f"{file}: {dataset.name}", math.prod(dataset.shape) * dataset.dtype.itemsize
    refuse_packed(size, dataset.id.get_storage_size(), where)
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if chunk > _LARGE:
        what = f"is stored in chunks of {chunk} bytes, each of which is in memory for any of its rows"
        raise TensorkeepError(what, where=where, hint="store it in smaller ones, or as .npy")
    return tuple(dataset.shape)


def refuse_packed(size: int, stored: int, where: str) -> None:
    """Refuse an array that a small file says to be large: whoever reads it would run out of memory.

    Args:
        size: bytes of the array.
        stored: bytes that it takes in the file.
        where: file and array, for messages.

    Raises:
        TensorkeepError: No features are compressed so well.
    """
    if size > max(_LARGE, _PACKED * stored):
        what = f"says it has {size / 2**30:.1f} GiB, of which {stored} bytes are in the file: one number over and over"
        raise TensorkeepError(what, where=where, hint="extract its features again, or store them as .npy")


def _datasets(found: Any) -> list[tuple[str, Any]]:
    """Return the datasets of numbers in a group and below it, by name from there; a dataset is called ""."""
    import h5py

    def holds_numbers(item: Any) -> bool:
        return isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu" and item.shape is not None

    if isinstance(found, h5py.Dataset):
        return [("", found)] if holds_numbers(found) else []
    made: list[tuple[str, Any]] = []

    def note(name: str, item: Any) -> bool | None:
        if holds_numbers(item):
            made.append((name, item))
        return True if len(made) >= _MOST else None

    found.visititems(note)
    return made
