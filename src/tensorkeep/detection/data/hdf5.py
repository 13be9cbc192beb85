"""Read features out of HDF5 files: one video's, or those of all videos in one file, each under its name.

h5py is no dependency: it is asked for where such a file is met. What lies outside of the file is not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained

CONTAINERS = (".h5", ".hdf5")
_MOST = 1000  # datasets of one video that are looked at
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


def _opened(file: Path) -> Any:
    """Open a file for reading."""
    try:
        import h5py
    except ImportError as error:
        hint = "pip install h5py; or store each video's array as .npy"
        raise TensorkeepError("HDF5 files are read by h5py, which is not installed", where=file, hint=hint) from error
    with explained(file):
        file.open("rb").close()
        try:
            return h5py.File(file, "r")
        except _ERRORS as error:
            raise TensorkeepError(f"is no HDF5 file that can be read: {error}", where=file) from error


def _get(opened: Any, name: str, file: Path) -> Any:
    """Return what a name leads to inside the file, step by step; None where it leads nowhere."""
    import h5py

    here = opened
    for part in PurePosixPath(name).parts:
        if not isinstance(here, h5py.Group) or part in ("/", "..") or part not in here:
            return None
        if isinstance(here.get(part, getlink=True), h5py.ExternalLink):
            raise TensorkeepError(f"{name} is a link to another file, which is not followed", where=file)
        here = here[part]
    return here


def _shape(dataset: Any, file: Path) -> tuple[int, ...]:
    """Return the shape of a dataset whose values lie in the file."""
    if dataset.is_virtual or dataset.external:
        raise TensorkeepError(f"the values of {dataset.name} lie in other files, which are not followed", where=file)
    return tuple(dataset.shape)


def _datasets(found: Any) -> list[tuple[str, Any]]:
    """Return the datasets of numbers in a group and below it, by name from there; a dataset is called ""."""
    import h5py

    if isinstance(found, h5py.Dataset):
        return [("", found)] if found.dtype.kind in "fiu" else []
    made: list[tuple[str, Any]] = []

    def note(name: str, item: Any) -> bool | None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu":
            made.append((name, item))
        return True if len(made) >= _MOST else None

    found.visititems(note)
    return made
