"""Read features of videos that were computed earlier: arrays of time steps and channels, one or several files a video.

Which axis is time the number of channels says, which a recipe knows; where both axes have that length, the recipe's
`feature_layout` does. What a file may be: `feature_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorkeep.detection.data.feature_files import Stored, open_array
from tensorkeep.errors import TensorkeepError

Rows = tuple[int, int]
_MIXED = 6  # most files of one video whose axes may differ from each other


class Looked(NamedTuple):
    """What the shapes of one video's files say.

    Attributes:
        steps: time steps, of the longest file.
        against: whether a file has the other axes than those that are said; None where the numbers of channels alone
            do not say which it has.
    """

    steps: int
    against: bool | None


def read_features(
    path: str | Path,
    channels: int,
    rows: Rows | None = None,
    *,
    channels_first: bool = False,
    key: str | None = None,
) -> Tensor:
    """Read the features of one file.

    Args:
        path: holds one array `[T, C]` or `[C, T]`.
        channels: C.
        rows: first and one-past-last of T to read; None: all.
        channels_first: which it is where T is C.
        key: name of the array in a file that holds several.

    Returns:
        `[C, T]`, float32.

    Raises:
        TensorkeepError: The file is no array of numbers, has no axis of `channels`, or a number is not finite.

    Example:
        >>> read_features("v_001.npy", 2048, (0, 100)).shape  # doctest: +SKIP
        torch.Size([2048, 100])
    """
    stored = open_array(path, key)
    turned, _ = _axes([path], [stored], channels, (), channels_first)
    return _part(path, stored, turned[0], rows)


def count_features(path: str | Path, channels: int, *, channels_first: bool = False, key: str | None = None) -> int:
    """Return the number of time steps T of a feature file; of `.npy`, `.npz` and HDF5 only the header is read."""
    return look_side_by_side([path], channels, channels_first=channels_first, key=key).steps


def read_side_by_side(
    paths: Sequence[str | Path],
    channels: int,
    steps: int,
    rows: Rows | None = None,
    *,
    channels_first: bool = False,
    widths: Sequence[int] = (),
    key: str | None = None,
) -> Tensor:
    """Read the features of one video from several files and put their channels side by side.

    Args:
        paths: in the order of the channels.
        channels: C, of all files together.
        steps: T of the longest file; a shorter one is stretched to it, linear in time, as OpenTAD does.
        rows: first and one-past-last of T to read; None: all.
        channels_first: whether the files hold `[C, T]` where both axes fit.
        widths: channels of each file, where they are known.
        key: name of the array in a file that holds several.

    Returns:
        `[C, T]`, float32.

    Raises:
        TensorkeepError: A file is no array of numbers, the channels do not fit, or a number is not finite.
    """
    stored = [open_array(path, key) for path in paths]
    turned, _ = _axes(paths, stored, channels, widths, channels_first)
    parts = []
    for path, one, first in zip(paths, stored, turned, strict=True):
        if len(paths) == 1 or one.shape[1 if first else 0] == steps:
            parts.append(_part(path, one, first, rows))
        else:
            whole = _part(path, one, first, None)[None]
            whole = F.interpolate(whole, steps, mode="linear", align_corners=False)[0]  # bit for bit as OpenTAD
            parts.append(whole if rows is None else whole[:, rows[0] : rows[1]])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def look_side_by_side(
    paths: Sequence[str | Path],
    channels: int,
    *,
    channels_first: bool = False,
    resized: bool = False,
    widths: Sequence[int] = (),
    key: str | None = None,
) -> Looked:
    """Look at the shapes of one video's feature files.

    Args:
        paths: in the order of the channels.
        channels: C, of all files together.
        channels_first: whether the files hold `[C, T]` where both axes fit.
        resized: whether files of different length are stretched to the longest.
        widths: channels of each file, where they are known.
        key: name of the array in a file that holds several.

    Raises:
        TensorkeepError: A file is no array of numbers, the channels do not fit, or the lengths differ and `resized` is
            not set.
    """
    stored = [open_array(path, key) for path in paths]
    turned, sure = _axes(paths, stored, channels, widths, channels_first)
    lengths = [one.shape[1 if first else 0] for one, first in zip(stored, turned, strict=True)]
    if len(set(lengths)) > 1 and not resized:
        each = ", ".join(f"{path}: {length} rows" for path, length in zip(paths, lengths, strict=True))
        what = f"files that are put side by side differ in length: {each}"
        raise TensorkeepError(what, hint="data.feature_rows resized stretches them to the longest, as OpenTAD does")
    return Looked(max(lengths), any(one != channels_first for one in turned) if sure else None)


def _axes(
    paths: Sequence[str | Path],
    stored: Sequence[Stored],
    channels: int,
    widths: Sequence[int],
    channels_first: bool,
) -> tuple[list[bool], bool]:
    """Return for each file whether it holds `[C, T]`, and whether the numbers of channels alone say so."""
    for path, one in zip(paths, stored, strict=True):
        if len(one.shape) != 2 or 0 in one.shape:
            what = f"its shape is {one.shape}, features are [time, channels] or [channels, time]"
            raise TensorkeepError(what, where=path)
    widths = (channels,) if len(paths) == 1 else widths
    if widths:
        fits = [(one.shape[1] == n, one.shape[0] == n) for one, n in zip(stored, widths, strict=True)]
        for path, one, width, fit in zip(paths, stored, widths, fits, strict=True):
            if not any(fit):
                what = f"its shape is {one.shape}: neither axis has the {width} channels that are asked for"
                asked = "in_channels" if len(paths) == 1 else "per_file, whose order is that of data.*.folder"
                raise TensorkeepError(what, where=path, hint=f"see model.projection.{asked}")
        return [channels_first if all(fit) else fit[1] for fit in fits], not any(map(all, fits))
    return _unknown_widths(paths, [one.shape for one in stored], channels, channels_first)


def _unknown_widths(
    paths: Sequence[str | Path], shapes: Sequence[tuple[int, ...]], channels: int, channels_first: bool
) -> tuple[list[bool], bool]:
    """Return the same as `_axes` where only the sum of the files' channels is known."""
    own = (channels_first,) * len(paths)
    mixed = len(paths) <= _MIXED
    fits = []
    for turned in product((False, True), repeat=len(paths)) if mixed else (own, (not channels_first,) * len(paths)):
        widths = [shape[0 if first else 1] for shape, first in zip(shapes, turned, strict=True)]
        lengths = {shape[1 if first else 0] for shape, first in zip(shapes, turned, strict=True)}
        if sum(widths) == channels and (len(lengths) == 1 or len(set(turned)) == 1):
            fits.append(turned)
    if own in fits or len(fits) == 1:
        return list(own if own in fits else fits[0]), len(fits) == 1
    if not fits:
        each = " + ".join(str(shape[0 if channels_first else 1]) for shape in shapes)
        what = f"{each} channels are not {channels}"
    else:
        what = f"the axes can be read in {len(fits)} ways with {channels} channels"
    named = f"{', '.join(str(path) for path in paths)} have shapes {', '.join(map(str, shapes))}"
    raise TensorkeepError(
        f"{what}: {named}", hint="see model.projection.in_channels; rows are time steps in all of them"
    )


def _part(path: str | Path, stored: Stored, turned: bool, rows: Rows | None) -> Tensor:
    """Read rows of a file as `[C, T]`, float32, all of them finite."""
    cut = slice(None) if rows is None else slice(*rows)
    part = stored.take((slice(None), cut) if turned else (cut, slice(None)))
    if isinstance(part, np.ndarray):
        with np.errstate(over="ignore"):  # what is too large for float32 is told below
            part = torch.from_numpy(part.astype(np.float32))
    part = (part.float() if turned else part.float().T).contiguous()
    if not bool(torch.isfinite(part.sum())):
        _refuse_unfinite(path, part, 0 if rows is None else rows[0])
    return part


def _refuse_unfinite(path: str | Path, part: Tensor, first: int) -> None:
    """Refuse numbers `[C, T]` of which one is not finite as float32, by its place."""
    odd = ~torch.isfinite(part)
    if not bool(odd.any()):
        return  # a sum that was too large
    step = int(odd.any(0).nonzero()[0])
    channel = int(odd[:, step].nonzero()[0])
    what = (
        f"{int(odd.sum())} of {part.numel()} numbers are not finite, the first, {float(part[channel, step])}, "
        f"at time step {first + step}, channel {channel}"
    )
    raise TensorkeepError(what, where=path, hint="extract its features again, or leave the video out: broken: skip")
