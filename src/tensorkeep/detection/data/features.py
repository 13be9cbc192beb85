"""Read features of videos that were computed earlier: one file a video, an array `[T, C]`.

No file can run code: `.npy` is read without pickle, `.pt` and `.safetensors` as any other checkpoint (`view.read`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage.files import explained

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


def read_features(
    path: str | Path, channels: int, rows: tuple[int, int] | None = None, *, channels_first: bool = False
) -> Tensor:
    """Read the features of one file.

    Args:
        path: holds one array `[T, C]` (or `[C, T]`).
        channels: C.
        rows: first and one-past-last of T to read; None: all.
        channels_first: whether the file holds `[C, T]`.

    Returns:
        `[C, T]`, float32.

    Raises:
        TensorkeepError: The file is no array of numbers, or not of `channels` channels.

    Example:
        >>> read_features("v_001.npy", 2048, (0, 100)).shape  # doctest: +SKIP
        torch.Size([2048, 100])
    """
    path = Path(path)
    array = _numpy_rows(path) if path.suffix == ".npy" else _tensor_rows(path)
    if array.ndim != 2:
        raise TensorkeepError(f"its shape is {tuple(array.shape)}, features are [T, C]", where=path)
    if channels_first:
        array = array.T
    if array.shape[1] != channels:
        turned = " (are they [C, T]? see channels_first)" if array.shape[0] == channels else ""
        raise TensorkeepError(f"has {array.shape[1]} channels, {channels} are asked for{turned}", where=path)
    part = array if rows is None else array[rows[0] : rows[1]]
    if isinstance(part, np.ndarray):
        part = torch.from_numpy(part.astype(np.float32))
    return part.float().T.contiguous()


def count_features(path: str | Path, channels: int, *, channels_first: bool = False) -> int:
    """Return the number of time steps T of a feature file; of an `.npy` only the header is read."""
    path = Path(path)
    array = _numpy_rows(path) if path.suffix == ".npy" else _tensor_rows(path)
    shape = tuple(array.shape)
    if len(shape) != 2 or shape[0 if channels_first else 1] != channels or 0 in shape:
        what = f"its shape is {shape}, not {'[C, T]' if channels_first else '[T, C]'} with {channels} channels"
        raise TensorkeepError(what, where=path, hint="see channels and channels_first of the recipe")
    return int(shape[1 if channels_first else 0])


def _numpy_rows(path: Path) -> NDArray[Any]:
    """Map an `.npy` file of numbers into memory."""
    with explained(path):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
            text = str(error).splitlines()[0]
            raise TensorkeepError(f"is no array that can be read: {text}", where=path) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise TensorkeepError("is no array of numbers", where=path)
    return array


def _tensor_rows(path: Path) -> Tensor:
    """Read the only tensor of a checkpoint file."""
    view = read(path)
    if len(view) != 1:
        raise TensorkeepError(f"holds {len(view)} tensors, a feature file holds one", where=path)
    return view.tensor(next(iter(view)))
