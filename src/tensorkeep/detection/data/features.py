"""Read features of videos that were computed earlier: one file a video, an array `[T, C]`.

No file can run code: `.npy` is read without pickle, `.pt` and `.safetensors` as any other checkpoint (`view.read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
    array = _numpy_rows(path) if path.suffix.lower() == ".npy" else _tensor_rows(path)
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
    array = _numpy_rows(path) if path.suffix.lower() == ".npy" else _tensor_rows(path)
    shape = tuple(array.shape)
    if len(shape) != 2 or shape[0 if channels_first else 1] != channels or 0 in shape:
        what = f"its shape is {shape}, not {'[C, T]' if channels_first else '[T, C]'} with {channels} channels"
        raise TensorkeepError(what, where=path, hint="see channels and channels_first of the recipe")
    return int(shape[1 if channels_first else 0])


def read_side_by_side(
    paths: Sequence[str | Path],
    channels: int,
    steps: int,
    rows: tuple[int, int] | None = None,
    *,
    channels_first: bool = False,
) -> Tensor:
    """Read the features of one video from several files and put their channels side by side.

    Args:
        paths: in the order of the channels.
        channels: C, of all files together.
        steps: T of the longest file; a shorter one is stretched to it, linear in time, as OpenTAD does.
        rows: first and one-past-last of T to read; None: all.
        channels_first: whether the files hold `[C, T]`.

    Returns:
        `[C, T]`, float32.

    Raises:
        TensorkeepError: A file is no array of numbers, or the channels do not add up to `channels`.
    """
    if len(paths) == 1:
        return read_features(paths[0], channels, rows, channels_first=channels_first)
    parts = []
    for path in paths:
        length, width = _shape(Path(path), channels_first)
        if length == steps:
            parts.append(read_features(path, width, rows, channels_first=channels_first))
        else:
            whole = read_features(path, width, channels_first=channels_first)[None]
            whole = F.interpolate(whole, steps, mode="linear", align_corners=False)[0]  # bit for bit as OpenTAD
            parts.append(whole if rows is None else whole[:, rows[0] : rows[1]])
    joined = torch.cat(parts)
    if len(joined) != channels:
        what = f"has {len(joined)} channels with {_named(paths[1:])}, {channels} are asked for"
        raise TensorkeepError(what, where=paths[0])
    return joined


def count_side_by_side(
    paths: Sequence[str | Path], channels: int, *, channels_first: bool = False, resized: bool = False
) -> int:
    """Return the number of time steps of one video's feature files together.

    Args:
        paths: in the order of the channels.
        channels: C, of all files together.
        channels_first: whether the files hold `[C, T]`.
        resized: whether files of different length are stretched to the longest.

    Raises:
        TensorkeepError: A file is no array of numbers, the channels do not add up to `channels`, or the lengths differ
            and `resized` is not set.
    """
    if len(paths) == 1:
        return count_features(paths[0], channels, channels_first=channels_first)
    shapes = [_shape(Path(path), channels_first) for path in paths]
    if sum(width for _, width in shapes) != channels:
        what = f"{' + '.join(str(width) for _, width in shapes)} channels are not {channels}: {_named(paths)}"
        raise TensorkeepError(what, hint="see model.projection.in_channels and feature_layout of the recipe")
    if len({length for length, _ in shapes}) > 1 and not resized:
        each = ", ".join(f"{path}: {length} rows" for path, (length, _) in zip(paths, shapes, strict=True))
        what = f"files that are put side by side differ in length: {each}"
        raise TensorkeepError(what, hint="data.feature_rows resized stretches them to the longest, as OpenTAD does")
    return max(length for length, _ in shapes)


def _named(paths: Sequence[str | Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _shape(path: Path, channels_first: bool) -> tuple[int, int]:
    """Return the time steps and channels of a file."""
    array = _numpy_rows(path) if path.suffix.lower() == ".npy" else _tensor_rows(path)
    shape = tuple(array.shape)
    if len(shape) != 2 or 0 in shape:
        raise TensorkeepError(f"its shape is {shape}, features are [T, C]", where=path)
    return (shape[1], shape[0]) if channels_first else (shape[0], shape[1])


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
