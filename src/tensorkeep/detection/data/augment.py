"""Augment clips of a video: one random draw for all frames of a clip, in plain tensor operations.

`draw_augmentation` takes every random number from the generator it is given, `augment` is a pure function of the
frames and the draw. So a sample is the same wherever it is made, whichever process makes it and however many threads
it has: statistics of a clip are integer sums, and floats are combined element by element in one fixed order.

What is drawn follows AdaTAD's training pipeline: a random resized crop, a flip, RandAugment with the fifteen
operations and strengths of imgaug's default policy (two a clip at magnitude 9 of 10), colour jitter. Three things
differ: signs are drawn for each clip, where the original draws them once a run; contrast, equalisation and
autocontrast look at the whole clip, where the original looks at each frame and makes it flicker; hue turns the
chroma plane of YIQ, so that all of colour jitter is one 3 x 3 matrix.

Frames are uint8 `[T, 3, H, W]`, RGB. Normalisation belongs to the backbone, which takes 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tensorkeep.errors import TensorkeepError

CHUNK = 8  # frames that are held as floats at a time: they stay in the cache
_CHUNK_OF_A_GPU = 128  # there few launches count, and memory
LUMA = (0.299, 0.587, 0.114)
_GREY = 128  # what is cut out is filled with it
_CROP_TRIES = 10


@dataclass(frozen=True)
class AugmentConfig:
    """How training clips are changed at random; the defaults are AdaTAD's for THUMOS.

    Attributes:
        size: pixels of each side of the square that comes out.
        short_side: pixels of the shorter side that videos are decoded to.
        crop: a random area of random shape ("resized"), a random place at full size ("random"), or the centre.
        area: range of the part of a frame that a "resized" crop takes.
        aspect: range of width / height of a "resized" crop.
        flip: probability of mirroring.
        operations: number of RandAugment's operations for a clip.
        magnitude: their strength, 0 to 10.
        jitter: largest part by which brightness, contrast and saturation change, and the hue in parts of a full turn.
    """

    size: int = 160
    short_side: int = 182
    crop: Literal["resized", "random", "centre"] = "resized"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    operations: int = 2
    magnitude: float = 9.0
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.short_side and self.crop != "resized":
            what = f"a crop of {self.size} does not fit into a short side of {self.short_side}"
            raise TensorkeepError(what, where="augment", hint="make short_side at least size")
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.aspect[0] <= self.aspect[1]):
            raise TensorkeepError(f"area {self.area} and aspect {self.aspect} are no ranges", where="augment")
        if not (0 <= self.flip <= 1 and 0 <= self.operations <= len(OPERATIONS) and 0 <= self.magnitude <= 10):
            what = f"flip {self.flip}, operations {self.operations} or magnitude {self.magnitude} is out of range"
            raise TensorkeepError(what, where="augment", hint=f"0 to 1, 0 to {len(OPERATIONS)}, 0 to 10")


class Draw(NamedTuple):
    """All that is random about one clip.

    Attributes:
        box: top, left, height and width of the crop in pixels.
        flip: whether the clip is mirrored.
        operations: name, signed strength (-1 to 1), and a place (down, right, each 0 to 1) of each operation.
        jitter: factors of brightness, contrast and saturation, and the turn of the hue.
        order: the order in which the four of `jitter` are applied.
    """

    box: tuple[int, int, int, int]
    flip: bool
    operations: tuple[tuple[str, float, float, float], ...]
    jitter: tuple[float, float, float, float]
    order: tuple[int, ...]


def draw_augmentation(config: AugmentConfig, height: int, width: int, generator: torch.Generator) -> Draw:
    """Draw what is random about one clip, for frames of `height` x `width` pixels.

    Raises:
        TensorkeepError: The frames are smaller than the crop.

    Example:
        >>> key = torch.Generator().manual_seed(0)
        >>> draw_augmentation(AugmentConfig(size=8, short_side=8, crop="centre"), 8, 12, key).box
        (0, 2, 8, 8)
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    box = _draw_box(config, height, width, uniform)
    flip = uniform(0, 1) < config.flip
    names = list(OPERATIONS)
    chosen = torch.randperm(len(names), generator=generator)[: config.operations].tolist()
    level = config.magnitude / 10
    operations = tuple(
        (names[k], level if uniform(0, 1) < 0.5 else -level, uniform(0, 1), uniform(0, 1)) for k in chosen
    )
    brightness, contrast, saturation = (uniform(max(0.0, 1 - part), 1 + part) for part in config.jitter[:3])
    hue = uniform(-config.jitter[3], config.jitter[3])
    order = tuple(torch.randperm(4, generator=generator).tolist())
    return Draw(box, flip, operations, (brightness, contrast, saturation, hue), order)


def augment(frames: Tensor, drawn: Draw, size: int) -> Tensor:
    """Apply a draw to frames `[T, 3, H, W]` uint8: `[T, 3, size, size]` uint8. No random number is taken here."""
    _check_frames(frames)
    top, left, height, width = drawn.box
    out = _resized(frames[:, :, top : top + height, left : left + width], size)
    if drawn.flip:
        out = out.flip(-1)
    for name, level, down, right in drawn.operations:
        out = OPERATIONS[name](out, level, down, right)
    return _jittered(out, drawn.jitter, drawn.order)


def centre_crop(frames: Tensor, size: int) -> Tensor:
    """Cut the middle `size` x `size` pixels out of frames `[T, 3, H, W]`, as evaluation does.

    Raises:
        TensorkeepError: The frames are smaller than `size`.

    Example:
        >>> centre_crop(torch.zeros(2, 3, 8, 13, dtype=torch.uint8), 8).shape
        torch.Size([2, 3, 8, 8])
    """
    _check_frames(frames)
    height, width = frames.shape[2:]
    if min(height, width) < size:
        raise TensorkeepError(f"frames of {height} x {width} are smaller than the crop of {size}", where="augment")
    top, left = (height - size) // 2, (width - size) // 2
    return frames[:, :, top : top + size, left : left + size].contiguous()


def _draw_box(
    config: AugmentConfig, height: int, width: int, uniform: Callable[[float, float], float]
) -> tuple[int, int, int, int]:
    """Draw the crop: top, left, height, width. The centre square is taken where no random area fits."""
    size = config.size
    if config.crop != "resized":
        if min(height, width) < size:
            raise TensorkeepError(f"frames of {height} x {width} are smaller than the crop of {size}", where="augment")
        if config.crop == "centre":
            return (height - size) // 2, (width - size) // 2, size, size
        return int(uniform(0, height - size + 1)), int(uniform(0, width - size + 1)), size, size
    for _ in range(_CROP_TRIES):
        area = uniform(*config.area) * height * width
        aspect = math.exp(uniform(math.log(config.aspect[0]), math.log(config.aspect[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _resized(frames: Tensor, size: int) -> Tensor:
    """Scale frames to `size` x `size`, bilinearly."""
    if frames.shape[2:] == (size, size):
        return frames.contiguous()
    return F.interpolate(frames.contiguous(), (size, size), mode="bilinear", antialias=True)


def chunk_of(frames: Tensor) -> int:
    """Return how many frames are treated at a time where these are."""
    return CHUNK if frames.device.type == "cpu" else _CHUNK_OF_A_GPU


def by_chunks(frames: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `function` to the frames as floats, some at a time, and round the result to uint8."""
    out, size = torch.empty_like(frames), chunk_of(frames)
    for part, place in zip(torch.split(frames, size), torch.split(out, size)):
        # by way of int16: torch's own way from floats to bytes takes five times as long
        place.copy_(function(part.float()).round_().clamp_(0, 255).to(torch.int16))
    return out


def _recoloured(frames: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Compute `matrix [3, 3] @ rgb + offset [3]` at every pixel."""
    rows, added = matrix.tolist(), offset.tolist()

    def recolour(x: Tensor) -> Tensor:
        out, product = torch.empty_like(x), torch.empty_like(x[:, 0])
        for i, (row, more) in enumerate(zip(rows, added)):
            channel = torch.mul(x[:, 0], row[0], out=out[:, i])
            # a product is rounded before it is added: fused, it would depend on where a thread's share ends
            channel.add_(torch.mul(x[:, 1], row[1], out=product)).add_(torch.mul(x[:, 2], row[2], out=product))
            channel.add_(more)
        return out

    return by_chunks(frames, recolour)


def _means(frames: Tensor) -> Tensor:
    """Return the mean of each channel over the clip, float64 `[3]`: exact sums, so that threads cannot change it."""
    # a row of up to 65,793 bytes adds up exactly in float32, in any order, and much faster than in int32
    sums = [part.float().sum(-1).double().sum((0, 2)) for part in torch.split(frames, CHUNK)]
    return torch.stack(sums).sum(0) / (frames.numel() // 3)


def saturation_matrix(factor: float) -> Tensor:
    """Return the matrix `[3, 3]` that mixes each colour with its grey."""
    grey = torch.tensor(LUMA, dtype=torch.float64).expand(3, 3)
    return torch.eye(3, dtype=torch.float64) * factor + grey * (1 - factor)


def hue_matrix(turn: float) -> Tensor:
    """Return the matrix `[3, 3]` that rotates the chroma plane of YIQ by `turn` of a full turn."""
    to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)
    c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = torch.tensor([(1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c)], dtype=torch.float64)
    turned: Tensor = torch.linalg.solve(to_yiq, rotation @ to_yiq)
    return turned


def _jittered(frames: Tensor, jitter: tuple[float, float, float, float], order: tuple[int, ...]) -> Tensor:
    """Change brightness, contrast (about the mean grey), saturation and hue in `order`, by one matrix and offset."""
    brightness, contrast, saturation, hue = jitter
    if jitter == (1.0, 1.0, 1.0, 0.0):
        return frames
    matrix, offset = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    means, luma = _means(frames), torch.tensor(LUMA, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    for step in order:
        grey = luma @ (matrix @ means + offset)
        turned = (eye * brightness, eye * contrast, saturation_matrix(saturation), hue_matrix(hue))[step]
        matrix, offset = turned @ matrix, turned @ offset + (grey * (1 - contrast) if step == 1 else 0.0)
    return _recoloured(frames, matrix, offset)


def _warped(frames: Tensor, matrix: tuple[float, float, float, float], shift: tuple[float, float] = (0, 0)) -> Tensor:
    """Move the content by `matrix` (xx, xy, yx, yy) about the centre, then by `shift` (x, y) in parts of the size.

    What comes from outside the frame is black.
    """
    height, width = frames.shape[2:]
    xx, xy, yx, yy = matrix
    det = xx * yy - xy * yx
    y, x = torch.meshgrid(
        (torch.arange(height, device=frames.device) + 0.5) / height * 2 - 1,
        (torch.arange(width, device=frames.device) + 0.5) / width * 2 - 1,
        indexing="ij",
    )
    x, y = x - 2 * shift[0], y - 2 * shift[1]
    # where each pixel comes from: the inverse, with both sides taken as equally long, as they are here
    grid = torch.stack([(yy * x - xy * y) / det, (-yx * x + xx * y) / det], -1)  # [H, W, 2]
    return by_chunks(frames, lambda part: F.grid_sample(part, grid.expand(len(part), -1, -1, -1), align_corners=False))


def _shear(frames: Tensor, level: float, along_x: bool) -> Tensor:
    """Shear by up to 17.19 degrees."""
    slope = math.tan(math.radians(17.19 * level))
    return _warped(frames, (1.0, slope, 0.0, 1.0) if along_x else (1.0, 0.0, slope, 1.0))


def _rotate(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Rotate by up to 30 degrees."""
    c, s = math.cos(math.radians(30 * level)), math.sin(math.radians(30 * level))
    return _warped(frames, (c, -s, s, c))


def _posterize(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Keep the highest 1 to 4 bits of each value."""
    bits = max(1, int(4 * abs(level)))
    return frames & (256 - (1 << (8 - bits)))


def _solarize(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Invert the values from a threshold on."""
    return torch.where(frames < 256 * abs(level), frames, 255 - frames)


def _contrast(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Move every value towards the clip's mean grey, or away from it."""
    factor = 1.8 * abs(level) + 0.1
    grey = float(_means(frames) @ torch.tensor(LUMA, dtype=torch.float64))
    return _recoloured(frames, torch.eye(3) * factor, torch.full((3,), grey * (1 - factor)))


def _sharpness(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Move every pixel towards the smoothed frame, or away from it."""
    factor = 1.8 * abs(level) + 0.1

    def sharpen(x: Tensor) -> Tensor:
        near = F.pad(x, (1, 1, 1, 1), mode="replicate")
        rows = near[:, :, :-2] + near[:, :, 1:-1] + near[:, :, 2:]
        # divided by a tensor: by a number a GPU would multiply with its inverse, which rounds otherwise
        smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x) / x.new_full((), 13.0)
        return smooth + (x - smooth) * factor

    return by_chunks(frames, sharpen)


def _autocontrast(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Stretch each channel so that the clip's darkest value becomes 0 and its brightest 255."""
    low, high = frames.amin((0, 2, 3)).double(), frames.amax((0, 2, 3)).double()
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1.0)
    return _recoloured(frames, torch.diag(scale), torch.where(high > low, -low * scale, 0.0))


def _equalize(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Spread each channel's values so that the clip's cumulative histogram becomes a straight line."""
    out = torch.empty_like(frames)
    for channel in range(3):
        counts = torch.bincount(frames[:, channel].flatten(), minlength=256)
        table = equal_table(counts)
        if table is None:
            out[:, channel] = frames[:, channel]
            continue
        for part, place in zip(torch.split(frames[:, channel], CHUNK), torch.split(out[:, channel], CHUNK)):
            place.copy_(torch.from_numpy(np.take(table.numpy(), part.numpy())))  # a fifth of the time of indexing
    return out


def equal_table(counts: Tensor) -> Tensor | None:
    """Return where `equalize` sends each value, uint8 `[256]`, for how often they occur; None: they stay."""
    step = int(counts.sum() - counts[counts.nonzero()[-1, 0]]) // 255
    if step == 0:
        return None
    before = counts.cumsum(0) - counts
    return ((before + step // 2) // step).clamp(max=255).to(torch.uint8)


def _cutout(frames: Tensor, level: float, down: float, right: float) -> Tensor:
    """Paint a grey square whose centre may lie anywhere."""
    height, width = frames.shape[2:]
    half = max(1, round(0.2 * abs(level) * min(height, width))) / 2
    out = frames.clone()
    rows = slice(max(0, round(down * height - half)), max(1, round(down * height + half)))
    out[:, :, rows, max(0, round(right * width - half)) : max(1, round(right * width + half))] = _GREY
    return out


Operation = Callable[[Tensor, float, float, float], Tensor]  # frames, strength, place down and right -> frames
_EYE, _NOTHING = torch.eye(3), torch.zeros(3)
OPERATIONS: dict[str, Operation] = {
    "shear_x": lambda x, level, _, __: _shear(x, level, True),
    "shear_y": lambda x, level, _, __: _shear(x, level, False),
    "translate_x": lambda x, level, _, __: _warped(x, (1, 0, 0, 1), (0.2 * level, 0)),
    "translate_y": lambda x, level, _, __: _warped(x, (1, 0, 0, 1), (0, 0.2 * level)),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "colour": lambda x, level, _, __: _recoloured(x, saturation_matrix(1.8 * abs(level) + 0.1), _NOTHING),
    "contrast": _contrast,
    "brightness": lambda x, level, _, __: _recoloured(x, _EYE * (1.8 * abs(level) + 0.1), _NOTHING),
    "sharpness": _sharpness,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda x, level, _, __: 255 - x,
    "cutout": _cutout,
}


def _check_frames(frames: Tensor) -> None:
    """Raise TensorkeepError for anything but uint8 frames `[T, 3, H, W]`."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        what = f"frames are {frames.dtype} {tuple(frames.shape)}"
        raise TensorkeepError(what, where="augment", hint="uint8 [T, 3, H, W]")
