"""Small layers and functions that several parts of the detector share: stochastic depth, masked convolutions, norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BY_HAND = ("segments", "two_level", "offload")  # ways of checkpointing that run a frozen block's backward by hand


class VideoShape(NamedTuple):
    """How tokens `[videos * chunks, t * h * w, C]` are laid out; tokens run over t, then h, then w.

    Attributes:
        videos: how many share the first axis; chunks of one video lie side by side.
        t: time steps of a chunk.
        h: rows of patches.
        w: columns of patches.
    """

    videos: int
    t: int
    h: int
    w: int


class VideoBackbone(nn.Module, ABC):
    """What a detector asks of a video network.

    Attributes:
        kind: its line in `detection/backbones`.
        config: its shape; `chunk_frames` go through it at a time, 0 meaning a whole window.
        checkpointing: which activations are kept for the backward.
        ladders: adapters beside it; None: none.
        fc_norm: a norm that its files hold and no feature map passes through; None: none.
        by_hand: whether its frozen blocks have a backward written by hand (`Block.frozen`).
    """

    kind: str
    config: Any
    checkpointing: str
    ladders: nn.Module | None
    fc_norm: nn.Module | None
    by_hand: bool = False

    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """Return its blocks, first to last."""

    @abstractmethod
    def forward(self, chunks: Tensor, videos: int) -> Tensor:
        """Encode raw frames `[videos * chunks, 3, t, H, W]`, 0..255: feature maps `[videos * chunks, C, t', h, w]`."""


class Rotation(Protocol):
    """A linear map of q and k that depends on where their tokens are."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to `x [N, heads, L, d]`."""

    def back(self, grad: Tensor) -> Tensor:
        """Apply its transpose to a gradient `[N, heads, L, d]`."""


def draw_kept(x: Tensor, rate: float, training: bool) -> Tensor | None:
    """Draw stochastic depth's factors `[N, 1, ...]` for `x [N, ...]`: 0, or `1 / (1 - rate)`; None means 1 for all."""
    if rate == 0.0 or not training:
        return None
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate).div_(1 - rate)


def add_kept(x: Tensor, branch: Tensor, kept: Tensor | None) -> Tensor:
    """Return `x + branch * kept` in one pass over memory; shapes as in `draw_kept`."""
    if kept is None:
        return x + branch
    return torch.addcmul(x, branch, kept.to(branch.dtype)) if x.dtype == branch.dtype else x + branch * kept


def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply a layer norm to the channels of `[B, C, T]`."""
    out: Tensor = norm(x.transpose(1, 2)).transpose(1, 2)
    return out


def halve_mask(mask: Tensor) -> Tensor:
    """Resize a mask `[B, T]` of valid steps to `[B, ceil(T / 2)]`, nearest with floor (`mask[:, ::2]` for even T).

    Example:
        >>> halve_mask(torch.tensor([[True, False, True]]))
        tensor([[ True, False]])
    """
    length = mask.shape[1]
    half = (length + 1) // 2
    if length % 2 == 0:
        return mask[:, ::2]
    return mask[:, torch.arange(half, device=mask.device) * length // half]


def pool_mask(mask: Tensor) -> Tensor:
    """Resize a mask `[B, T]` of valid steps to `[B, ceil(T / 2)]`: valid where one of the three steps pooled is.

    Example:
        >>> pool_mask(torch.tensor([[True, False, False, True, False]]))
        tensor([[ True,  True,  True]])
    """
    padded = F.pad(mask, (1, 1))
    half = (mask.shape[-1] + 1) // 2
    left, centre, right = (padded[..., k::2][..., :half] for k in range(3))
    return left | centre | right


class ConvModule(nn.Module):
    """Convolution, mask, layer norm (eps 1e-6), ReLU, mask."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, C', T]` for `x [B, C, T]` and `mask [B, T]`, zero where invalid."""
        keep = mask[:, None].to(x.dtype)  # [B, 1, T]
        x = channel_norm(self.conv(x) * keep, self.norm)  # [B, C', T]
        return F.relu(x) * keep  # [B, C', T]


class FileConv(nn.Module):
    """Convolution of width 1 of one file's channels, then the mask."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, 1)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, C', T]` for `x [B, C, T]` and `mask [B, T]`, zero where invalid."""
        out: Tensor = self.conv(x)  # [B, C', T]
        return out * mask[:, None].to(out.dtype)


class ScaledPath(nn.Module):
    """A residual branch's per-channel scale (from 1e-4, or none) and stochastic depth."""

    def __init__(self, channels: int, rate: float, scaled: bool) -> None:
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.full((1, channels, 1), 1e-4)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x [B, C, T]`, and drop whole samples in training."""
        x = x if self.scale is None else self.scale * x  # [B, C, T]
        kept = draw_kept(x, self.rate, self.training)
        return x if kept is None else x * kept


class LevelScale(nn.Module):
    """One learned factor for a level's offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Scale offsets `[B, 2, T]`."""
        return x * self.scale


def normalise_frames(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return `(frames - mean) / std` in float32; frames `[N, 3, t, H, W]`, any dtype, on the 0..255 scale."""
    centre, spread = _channel_constants(mean, std, frames.device)
    return (frames.float() - centre) / spread


@lru_cache(maxsize=8)
def _channel_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as tensors `[3, 1, 1, 1]` on a device."""
    values = torch.tensor([mean, std]).view(2, -1, 1, 1, 1).to(device)
    return values[0], values[1]
