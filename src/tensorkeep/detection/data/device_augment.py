"""Augment whole clips on the device that trains, so that the processes that decode do nothing else.

The draws are `augment.draw_augmentation`'s and the pixels `augment.augment`'s: the same sums in the same order, over
many frames at a time, and nothing waits for the device but `equalize`, which makes its table on the host.

- Scaling is done in integers, as torch scales bytes on a CPU: the same bits on every device.
- Colours are products and sums of float32, each rounded by itself: the same bits, but where a clip's mean (float64)
  rounds otherwise.
- Operations that move pixels (shears, translations, rotation) interpolate with the device's own kernel: a GPU's differs
  by one step of 255 where a value lies at a rounding boundary. Later operations may widen that.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from tensorkeep.detection.data.augment import (
    LUMA,
    OPERATIONS,
    Draw,
    Operation,
    by_chunks,
    chunk_of,
    equal_table,
    hue_matrix,
    saturation_matrix,
)

_EYE = torch.eye(3, dtype=torch.float64)


class Uncut(NamedTuple):
    """The frames of a sample before its augmentation.

    Attributes:
        frames: uint8 `[T, 3, h, w]`, cut to the draw's box.
        drawn: what is random about them; None: nothing is done to them, they have their size.
    """

    frames: Tensor
    drawn: Draw | None


def cut_out(frames: Tensor, drawn: Draw) -> Uncut:
    """Cut frames `[T, 3, H, W]` to the box of a draw and leave the rest of it to `augment_uncut`.

    In a process that loads data they are cut into the memory that is shared with the one that trains: a copy less.
    """
    top, left, height, width = drawn.box
    part = frames[:, :, top : top + height, left : left + width]
    return Uncut(part.contiguous() if get_worker_info() is None else default_collate([part])[0], drawn)


def augment_uncut(clip: Uncut, size: int) -> Tensor:
    """Apply a clip's draw where its frames are: uint8 `[T, 3, size, size]`.

    Args:
        clip: from `cut_out`; its tuples may have become lists on the way.
        size: pixels of a side.
    """
    out, drawn = clip.frames, clip.drawn
    if drawn is None:
        return out
    out = scaled(out, size)
    if drawn.flip:
        out = out.flip(-1)
    for name, level, down, right in drawn.operations:
        out = _OPERATIONS.get(name, OPERATIONS[name])(out, level, down, right)
    return _jittered(out, tuple(drawn.jitter), tuple(drawn.order))


def augment_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Make the `inputs [B, 3, T, size, size]` of a batch whose samples are uncut; another batch stays as it is."""
    clips = batch["inputs"]
    if isinstance(clips, Tensor):
        return batch
    first = clips[0].frames
    out = first.new_empty(len(clips), 3, len(first), size, size)
    for place, clip in zip(out, clips):
        place.copy_(augment_uncut(clip, size).transpose(0, 1))
    return {**batch, "inputs": out}


def scaled(frames: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Scale frames `[T, 3, h, w]` bilinearly, each pixel an integer mean of those it covers.

    Args:
        frames: uint8.
        size: pixels of each side, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    for side, length in ((3, width), (2, height)):
        if frames.shape[side] != length:
            parts = torch.split(frames, chunk_of(frames))
            frames = torch.cat([_scaled_along(part, side, length) for part in parts])
    return frames


def _scaled_along(frames: Tensor, side: int, size: int) -> Tensor:
    """Scale one side of frames: sums of 16-bit weights times bytes, rounded half up."""
    places, weights, bits = _taps(frames.shape[side], size, frames.device)
    shape = [size, 1] if side == 2 else [size]
    out: Tensor | None = None
    for place, weight in zip(places, weights):
        product = frames.index_select(side, place).int() * weight.view(shape)
        out = product.add_(1 << (bits - 1)) if out is None else out.add_(product)
    assert out is not None
    return (out >> bits).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def _taps(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return where each tap of scaling `length -> size` reads and its weight, `[taps, size]`, and the weights' bits.

    A triangle as wide as two output pixels (at least two input pixels), in float64, then as 16-bit integers of as many
    bits as the largest weight leaves.
    """
    scale = length / size
    support = max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    places, weights = torch.zeros(taps, size, dtype=torch.int64), torch.zeros(taps, size, dtype=torch.float64)
    for i in range(size):
        centre = scale * (i + 0.5)
        first = max(int(centre - support + 0.5), 0)
        count = min(min(int(centre + support + 0.5), length) - first, taps)
        found = [max(0.0, 1 - abs((j + first - centre + 0.5) / support)) for j in range(count)]
        places[:, i] = torch.arange(first, first + taps).clamp(max=length - 1)
        weights[:count, i] = torch.tensor(found, dtype=torch.float64) / sum(found)
    bits, most = 0, float(weights.max())
    while bits < 22 and int(0.5 + most * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return places.to(device), (weights * (1 << bits) + 0.5).int().to(device), bits


def _means(frames: Tensor) -> Tensor:
    """Return the mean of each channel over the clip, float64 `[3]`, from exact sums; nothing waits for it."""
    # a row of up to 65,793 bytes adds up exactly in float32, in any order
    sums = [part.float().sum(-1).double().sum((0, 2)) for part in torch.split(frames, chunk_of(frames))]
    return torch.stack(sums).sum(0) / (frames.numel() // 3)


def _grey(frames: Tensor, weights: list[float]) -> Tensor:
    """Return the sum of the channels' means times `weights`, float64 `[]`."""
    means = _means(frames)
    red, green, blue = weights
    return means[0] * red + means[1] * green + means[2] * blue


def _recoloured(frames: Tensor, matrix: list[list[Any]], offset: list[Any]) -> Tensor:
    """Compute `matrix @ rgb + offset` at every pixel; entries are numbers, or tensors `[]` on the device."""

    def recolour(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i, (row, more) in enumerate(zip(matrix, offset)):
            channel = torch.mul(x[:, 0], row[0], out=out[:, i])
            channel.add_(x[:, 1] * row[1]).add_(x[:, 2] * row[2]).add_(more)
        return out

    return by_chunks(frames, recolour)


def _jittered(frames: Tensor, jitter: tuple[float, ...], order: tuple[int, ...]) -> Tensor:
    """Change brightness, contrast, saturation and hue in `order`, by one matrix and offset.

    Contrast alone adds something: a multiple of the mean grey, known on the host but for that one number.
    """
    if jitter == (1.0, 1.0, 1.0, 0.0):
        return frames
    brightness, contrast, saturation, hue = jitter
    matrix, of_grey = _EYE, torch.zeros(3, dtype=torch.float64)
    weights = torch.tensor(LUMA, dtype=torch.float64)
    to_grey = weights
    for step in order:
        if step == 1:
            to_grey = weights @ matrix
        turned = (_EYE * brightness, _EYE * contrast, saturation_matrix(saturation), hue_matrix(hue))[step]
        matrix, of_grey = turned @ matrix, turned @ of_grey + (1 - contrast if step == 1 else 0.0)
    grey = _grey(frames, to_grey.tolist())
    return _recoloured(frames, matrix.tolist(), [(grey * part).float() for part in of_grey.tolist()])


def _contrast(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Move every value towards the clip's mean grey, or away from it."""
    factor = 1.8 * abs(level) + 0.1
    added = (_grey(frames, list(LUMA)) * (1 - factor)).float()
    return _recoloured(frames, (_EYE * factor).tolist(), [added] * 3)


def _autocontrast(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Stretch each channel so that the clip's darkest value becomes 0 and its brightest 255."""
    low, high = frames.amin((0, 2, 3)).double(), frames.amax((0, 2, 3)).double()
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1.0)
    added = torch.where(high > low, -low * scale, 0.0).float()
    diagonal = [[s if i == j else 0.0 for j in range(3)] for i, s in enumerate(scale.float())]
    return _recoloured(frames, diagonal, list(added))


def _equalize(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Spread each channel's values so that the clip's cumulative histogram becomes a straight line."""
    out = torch.empty_like(frames)
    for channel in range(3):
        table = equal_table(torch.bincount(frames[:, channel].flatten(), minlength=256).cpu())
        if table is None:
            out[:, channel] = frames[:, channel]
            continue
        there, size = table.to(frames.device), chunk_of(frames)
        for part, place in zip(torch.split(frames[:, channel], size), torch.split(out[:, channel], size)):
            place.copy_(there[part.long()])
    return out


# what is not done here (places, bits, sharpness) is one function for every device
_OPERATIONS: dict[str, Operation] = {
    "colour": lambda x, level, _, __: _recoloured(x, saturation_matrix(1.8 * abs(level) + 0.1).tolist(), [0.0] * 3),
    "brightness": lambda x, level, _, __: _recoloured(x, (_EYE * (1.8 * abs(level) + 0.1)).tolist(), [0.0] * 3),
    "contrast": _contrast,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
