"""Open the array of a feature file: its shape at once, rows on demand.

No file can run code: `.npy` and `.npz` are read without pickle, `.pt` and `.safetensors` as any other checkpoint
(`view.read`), and of a `.pkl` the array's bytes are taken and nothing is called (`storage.pickles`). An HDF5 file may
hold one video, or be all of a folder's files: FILE.h5/KEY is then the path of one.
"""

from __future__ import annotations

import io
import math
import stat
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tensorkeep.detection.data.hdf5 import CONTAINERS, container_of, open_hdf5, refuse_packed
from tensorkeep.detection.data.numpy_pickles import arrays_of, read_pickle
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage.files import explained

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors", ".pkl", ".pickle", *CONTAINERS, ".csv")
USUAL = "feats"  # the array's name in a file of several, as OpenTAD and ActionFormer have it
_LARGEST = 1 << 32  # numbers of an array: a small file may say that it has more
_HEAD = 1 << 16  # bytes in which an array's header lies
_LINE = 1 << 26  # characters of a table's line
Index = tuple[Any, ...]
Array = NDArray[Any] | Tensor
Opened = tuple[tuple[int, ...], Callable[[Index], Array]]  # a shape, and what reads the part at an index
_REAL = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8")  # dtypes of tensors that may be features
_ERRORS = (  # of numpy and of zip archives, about files that are damaged or none of theirs
    *(ValueError, EOFError, SyntaxError, TypeError, MemoryError, KeyError, RuntimeError, OverflowError),
    *(zlib.error, zipfile.BadZipFile, tokenize.TokenError),  # numpy reads an old header as Python's words
)


class Stored(NamedTuple):
    """An array of a feature file.

    Attributes:
        shape: its two axes, or what else it has; axes of length 1 are left out where there are more than two.
        take: gives the part at an index of these axes, as the numbers are stored.
    """

    shape: tuple[int, ...]
    take: Callable[[Index], Array]


def open_array(path: str | Path, key: str | None = None) -> Stored:
    """Open the array of a feature file.

    Args:
        path: the file, or FILE.h5/KEY.
        key: name of the array in a file that holds several; None: the only one, or `feats`.

    Raises:
        TensorkeepError: The file is no array of numbers, or none that is read here, or does not say which it is.

    Example:
        >>> open_array("v_001.npy").shape  # doctest: +SKIP
        (2304, 2048)
    """
    path = Path(path)
    with explained(path):
        if not stat.S_ISREG(file_of(path).stat().st_mode):  # a pipe would be waited for
            raise TensorkeepError("is no file", where=path, hint="features are read from files alone")
        arrays = _opener(path)(path)
    shape, take = arrays[_chosen(list(arrays), key, path)]
    if math.prod(shape) > _LARGEST:
        raise TensorkeepError(f"says it has {math.prod(shape)} numbers, more than any feature file", where=path)
    kept = [axis for axis, length in enumerate(shape) if length != 1]
    for axis in reversed(range(len(shape))):  # a length of 1 is an axis too where there are not two others
        if len(kept) < min(2, len(shape)) and axis not in kept:
            kept = sorted([*kept, axis])
    if len(shape) <= 2:
        return Stored(shape, take)

    def part(index: Index) -> Array:
        inner = dict(zip(kept, index, strict=True))
        return take(tuple(inner.get(axis, 0) for axis in range(len(shape))))

    return Stored(tuple(shape[axis] for axis in kept), part)


def file_of(path: str | Path) -> Path:
    """Return the file that a path lies in: of FILE.h5/KEY the HDF5 file, else the path.

    Args:
        path: of a feature file.
    """
    return container_of(Path(path)) or Path(path)


def _opener(path: Path) -> Callable[[Path], dict[str, Opened]]:
    """Return what opens a file, by its ending: it gives the arrays of numbers by name."""
    if container_of(path) is not None:
        return open_hdf5
    found = {".npy": _npy, ".npz": _npz, ".csv": _csv, ".pkl": _pickle, ".pickle": _pickle}
    return found.get(path.suffix.lower(), _checkpoint)


def _chosen(names: Sequence[str], key: str | None, where: object) -> str:
    """Return which of a file's arrays is meant."""
    shown = ", ".join(repr(name) for name in names[:6]) + (", ..." if len(names) > 6 else "")
    if not names:
        raise TensorkeepError("holds no array of numbers", where=where)
    if key is not None and list(names) != [""]:
        if key not in names:
            raise TensorkeepError(f"holds no {key!r}, but {shown}", where=where, hint="see data.feature_key")
        return key
    if len(names) == 1 or USUAL in names:
        return USUAL if USUAL in names else names[0]
    what = f"holds {len(names)} arrays ({shown}), a feature file holds one, or one called {USUAL!r}"
    raise TensorkeepError(what, where=where, hint="data.feature_key names the one that is meant")


def _npy(path: Path) -> dict[str, Opened]:
    """Map an `.npy` file into memory."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEAD)
        if start[:2] != b"PK":
            _header(start)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _ERRORS as error:
        raise TensorkeepError(f"is no array that can be read: {_first(error)}", where=path) from error
    if not isinstance(array, np.ndarray):
        raise TensorkeepError("is an .npz under another name", where=path, hint="rename it")
    if array.dtype.kind not in "fiu":
        raise TensorkeepError(f"is no array of numbers: its dtype is {array.dtype}", where=path)
    return {"": _in_memory(array)}


def _npz(path: Path) -> dict[str, Opened]:
    """Read the headers of the arrays in an `.npz`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist()[:1000] if name.endswith(".npy")]
            heads = {name.removesuffix(".npy"): _head(archive, name) for name in names}
    except _ERRORS as error:
        raise TensorkeepError(f"is no .npz that can be read: {_first(error)}", where=path) from error

    def of(name: str) -> Callable[[Index], Array]:
        def take(index: Index) -> Array:
            try:
                with explained(path), np.load(path, allow_pickle=False) as archive:
                    array: NDArray[Any] = archive[name]
            except _ERRORS as error:
                raise TensorkeepError(f"{name} cannot be read: {_first(error)}", where=path) from error
            return array[index]

        return take

    return {name: (shape, of(name)) for name, (shape, dtype) in heads.items() if dtype.kind in "fiu"}


def _head(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of an entry, which has as many bytes as they say."""
    entry = archive.getinfo(name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that numpy does not use")
    with archive.open(entry) as file:
        shape, dtype, begin = _header(file.read(_HEAD))
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind in "fiu" and size > entry.file_size - begin:
        raise ValueError(f"{name} says its shape is {shape}, and has {entry.file_size - begin} bytes")
    refuse_packed(size, entry.compress_size, f"{archive.filename}: {name}")
    return shape, dtype


def _header(start: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape and dtype that the start of an `.npy` says, and where its numbers begin."""
    file = io.BytesIO(start)  # a header says how long it is, which may be gigabytes
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _fortran, dtype = reader(file)
    if any(length < 0 for length in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, dtype, file.tell()


def _first(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checkpoint(path: Path) -> dict[str, Opened]:
    """Open tensors, or the numpy arrays that torch.save wrote."""
    view = read(path)

    def of(name: str) -> Callable[[Index], Array]:
        return lambda index: view.tensor(name)[index]

    if len(view):
        return {name: (view[name].shape, of(name)) for name in view if view[name].dtype in _REAL}
    return {name: _in_memory(array) for name, array in arrays_of(view.entries, path).items()}


def _pickle(path: Path) -> dict[str, Opened]:
    """Take numpy arrays out of a pickle; what torch.save wrote is read as such."""
    found = read_pickle(path)
    if found is None:
        return _checkpoint(path)
    return {name: _in_memory(array) for name, array in arrays_of(found, path).items()}


def _csv(path: Path) -> dict[str, Opened]:
    """Read a table of numbers, whose first line may name its columns."""
    how: dict[str, Any] = {"delimiter": ",", "ndmin": 2, "comments": None, "encoding": "utf-8-sig"}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(_LINE)
    if len(line) == _LINE:
        raise TensorkeepError(f"is no table of numbers: its first line has {_LINE} characters or more", where=path)
    first = line.strip().split(",")
    try:
        numbers = [float(cell) for cell in first]
    except ValueError:
        numbers = []
    named = not numbers or (len(first) > 1 and numbers == list(range(len(first))))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a table without rows, which is told as its shape
            table: NDArray[Any] = np.loadtxt(path, np.float32, skiprows=int(named), **how)
    except ValueError as error:
        hint = "each line has as many numbers, with commas between; the first may name the columns"
        raise TensorkeepError(f"is no table of numbers: {_first(error)}", where=path, hint=hint) from error
    return {"": _in_memory(table)}


def _in_memory(array: NDArray[Any]) -> Opened:
    return array.shape, lambda index: array[index]
