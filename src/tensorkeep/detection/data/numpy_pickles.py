"""Take numpy arrays out of a pickle without running it: what it would call is read as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.pickles import parse
from tensorkeep.storage.record import checked_shape

_ALLOWED = tuple(
    f"{module}.{name}"
    for module, name in (
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),  # a rate beside the array, say
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
    )
)
_TORCH_SAVE = 0x1950A86A20F9469CFC6C  # what a file of torch.save before 1.6 begins with, pickled
_NUMBERS = re.compile(r"f[248]|[iu][1248]")


def read_pickle(path: Path) -> Any:
    """Read what a pickle of plain values and numpy arrays describes.

    Args:
        path: the file.

    Returns:
        The value, for `arrays_of`; None where torch.save wrote the file.

    Raises:
        TensorkeepError: The file is damaged, or names anything but numpy's arrays (F04): nothing of it is run.
    """
    with explained(path):
        data = path.read_bytes()
    if data[:2] == b"PK":
        return None
    try:
        value, _ = parse(data, _ALLOWED, path)
    except TensorkeepError as error:
        if error.code != "F04":
            raise
        hint = "where you trust it, load it and store the array as .npy; a tensor is written by torch.save"
        raise TensorkeepError(error.what, where=path, code=error.code, hint=hint) from error
    return None if type(value) is int and value == _TORCH_SAVE else value


def arrays_of(value: Any, where: object) -> dict[str, NDArray[Any]]:
    """Return the arrays of numbers that a pickle holds: one alone under the name "", or those of a dict.

    Args:
        value: what `parse` made of it.
        where: the file, for messages.

    Raises:
        TensorkeepError: An array's values are damaged.
    """
    if isinstance(value, Object) and value.is_mapping:
        value = value.entries or {}
    named = value if isinstance(value, Mapping) else {"": value}
    made = {str(name): _array(item, where) for name, item in named.items() if isinstance(item, Object)}
    return {name: array for name, array in made.items() if array is not None}


def _array(value: Object, where: object) -> NDArray[Any] | None:
    """Make the array that numpy's own pickling describes; None where it is none of numbers."""
    match value.call.name, value.args, value.state:
        case "_frombuffer", (data, kind, shape, order), _:
            pass
        case "_reconstruct", _, (_, shape, kind, fortran, data):
            order = "F" if fortran else "C"
        case _:
            return None
    dtype, sizes, raw = _dtype(kind), checked_shape(shape), _bytes(data)
    if dtype is None:
        return None
    if raw is None or sizes is None or order not in ("C", "F") or len(raw) != math.prod(sizes) * dtype.itemsize:
        raise TensorkeepError("holds a numpy array whose bytes do not fit its shape", where=where, code="F02")
    return np.frombuffer(raw, dtype).reshape(sizes, order=order)


def _dtype(value: Any) -> np.dtype[Any] | None:
    """Return the dtype that a pickle describes; None where it is none of whole or broken numbers."""
    if not isinstance(value, Object) or value.call.name != "dtype" or not isinstance(value.state, tuple):
        return None
    match value.args, value.state:
        case (str(code), *_), (_, "<" | ">" | "|" | "=" as order, *_) if _NUMBERS.fullmatch(code):
            found: np.dtype[Any] = np.dtype(order + code)
            return found
        case _:
            return None


def _bytes(value: Any) -> bytes | None:
    """Return an array's bytes; protocols before 3 spell them as text."""
    if isinstance(value, Object) and value.call.name == "encode" and len(value.args) == 2:
        text = value.args[0]
        try:
            return text.encode("latin1") if isinstance(text, str) and value.args[1] == "latin1" else None
        except UnicodeEncodeError:
            return None
    return value if isinstance(value, bytes) else None
