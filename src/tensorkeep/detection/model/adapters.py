"""Adapters for the video transformer: three kinds for the end of a block, and LoRA on its pretrained linears.

`Adapter` is OpenTAD's temporal-informative adapter (TIA); `QLoRAAdapter` is the same with frozen, quantized projections
under LoRA; `PlainAdapter` looks at no other time step. Trainable weights are float32 and are cast to the activations'
dtype at use, so a bf16 backbone needs no autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.adapters.lora import low_rank
from tensorkeep.detection.model._time_mix import time_mix
from tensorkeep.detection.model.config import LORA_TARGETS, AdapterConfig, LoraConfig, Tuning, VitConfig, is_added
from tensorkeep.detection.model.layers import VideoShape
from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.quantization.linear import QuantLinear


def _linear(x: Tensor, layer: nn.Linear, factor: Tensor | None = None) -> Tensor:
    """Return `factor * layer(x)` in the dtype of `x`; the factor `[1]` goes into the weights, which are smaller."""
    if factor is None:
        return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
    return F.linear(x, (layer.weight * factor).to(x.dtype), (layer.bias * factor).to(x.dtype))


class TemporalConv(nn.Module):
    """Depthwise convolution over time, then pointwise: `u -> W (w * u + b_w) + b`, on `[V, T, S, r]`.

    Written as matrix products on the token layout: no transpose, and a backward of matrix products and sums.
    """

    dwconv: nn.Conv1d
    conv: nn.Conv1d

    def _make_temporal(self, width: int, kernel_size: int) -> None:
        """Make the two convolutions over time; `width` is r."""
        self.dwconv = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.conv = nn.Conv1d(width, width, 1)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2.0 / kernel_size))
        nn.init.normal_(self.conv.weight, std=math.sqrt(2.0 / width))
        for layer in (self.dwconv, self.conv):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def temporal(self, z: Tensor, shape: VideoShape) -> Tensor:
        """Return `z + conv(dwconv(z))` for `z [videos * chunks, t*h*w, r]`, over all chunks of a video."""
        depthwise, pointwise = self.dwconv.weight, self.conv.weight.squeeze(-1)  # [r, 1, k], [r, r]
        assert self.dwconv.bias is not None and self.conv.bias is not None
        # both convolutions are linear: each time step has one matrix
        taps = pointwise * depthwise[:, 0].T[:, None]  # [k, r, r]
        bias = pointwise @ self.dwconv.bias + self.conv.bias
        u = z.reshape(shape.videos, -1, shape.h * shape.w, z.shape[-1])  # [V, T, h*w, r]: chunks lie in time order
        return time_mix(u, taps.to(z.dtype), bias.to(z.dtype)).view(z.shape)


class Adapter(TemporalConv):
    """AdaTAD's temporal-informative adapter; it starts as the identity, since `up_proj` is zero.

    `z = GELU(down x)`; `y = x + gamma * up(z + conv(dwconv_k3(z)))`, both convolutions over the time of the whole
    video. Parameters per block: `2 C r + r^2 + 6 r + C + 1`.
    """

    def __init__(self, dim: int, width: int, kernel_size: int = 3) -> None:
        super().__init__()
        self._make_temporal(width, kernel_size)
        self.down_proj = nn.Linear(dim, width)
        self.up_proj = nn.Linear(width, dim)
        self.gamma = nn.Parameter(torch.ones(1))
        _start_as_identity(self.down_proj, self.up_proj)

    def branch(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return what is added to `x [videos * chunks, t*h*w, C]`."""
        z = F.gelu(_linear(x, self.down_proj))  # [N, L, r]
        return _linear(self.temporal(z, shape), self.up_proj, self.gamma)  # [N, L, C]

    def forward(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return `x` plus the branch."""
        return x + self.branch(x, shape)  # [videos * chunks, t*h*w, C]


class PlainAdapter(nn.Module):
    """A bottleneck without a temporal convolution: `y = x + gamma * up(GELU(down x))`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(dim, width)
        self.up_proj = nn.Linear(width, dim)
        self.gamma = nn.Parameter(torch.ones(1))
        _start_as_identity(self.down_proj, self.up_proj)

    def branch(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return what is added to `x [videos * chunks, t*h*w, C]`."""
        return _linear(F.gelu(_linear(x, self.down_proj)), self.up_proj, self.gamma)  # [N, L, C]

    def forward(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return `x` plus the branch."""
        return x + self.branch(x, shape)  # [videos * chunks, t*h*w, C]


class LoRALinear(nn.Module):
    """A frozen linear (dense or quantized) plus a trainable low-rank update: `base(x) + (alpha / r) B A drop(x)`.

    The base is a child of its own, as detection's files name it (`X.base.weight`); the arithmetic is `lora.low_rank`.
    `lora_B` starts at zero, so the first forward equals the base bitwise where the base has no dropout of its own.

    Args:
        base: the linear; its parameters stop training.
        r: rank.
        alpha: scale of the update times the rank.
        dropout: rate before the update.

    Raises:
        TensorkeepError: `r` is below 1.

    Example:
        >>> layer = LoRALinear(nn.Linear(8, 4), r=2, alpha=4)
        >>> sorted(n for n, p in layer.named_parameters() if p.requires_grad)
        ['lora_A', 'lora_B']
    """

    base: nn.Linear | QuantLinear

    def __init__(self, base: nn.Linear | QuantLinear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if r < 1:
            raise TensorkeepError(f"lora_r must be at least 1, got {r}", where="LoRALinear")
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / r
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of base and update, `[..., out]`, for `x [..., in]`."""
        return low_rank(x, self.base, self.lora_A, self.lora_B, self.scale, self.dropout if self.training else 0.0)


class QLoRAAdapter(TemporalConv):
    """Adapter with frozen, quantizable down and up projections under LoRA, and a trainable temporal convolution.

    The frozen projections hold no pretrained knowledge: `down_proj.base` is a random projection and `up_proj.base`
    is zero, so that training starts from the identity. At C=384, ratio 0.25, r=16: 98,785 parameters, 25,057 of
    them trainable. `quantize_adapters` stores the frozen ones in `quantize_bits`.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        lora_r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.1,
        quantize_bits: int = 4,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if quantize_bits not in (4, 8):
            raise TensorkeepError(f"quantize_bits must be 4 or 8, got {quantize_bits}", where="QLoRAAdapter")
        self.quantize_bits = quantize_bits
        self._make_temporal(width, kernel_size)
        down, up = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)
        _start_as_identity(down, up)
        self.down_proj = LoRALinear(down, lora_r, lora_alpha, lora_dropout)
        self.up_proj = LoRALinear(up, lora_r, lora_alpha, lora_dropout)
        self.gamma = nn.Parameter(torch.ones(1))

    def branch(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return what is added to `x [videos * chunks, t*h*w, C]`."""
        z = F.gelu(self.down_proj(x))  # [N, L, r]
        out: Tensor = self.up_proj(self.temporal(z, shape))  # [N, L, C]
        return out * self.gamma.to(out.dtype)

    def forward(self, x: Tensor, shape: VideoShape) -> Tensor:
        """Return `x` plus the branch."""
        return x + self.branch(x, shape)  # [videos * chunks, t*h*w, C]


Branch = Callable[[Tensor, VideoShape], Tensor]
Run = Callable[[Branch, Tensor, VideoShape], Tensor]


class Ladder(nn.Module):
    """AdaTAD's side-tuning: adapters beside a frozen ViT whose sum is added to its output.

    `y = x_last + sum over rungs of branch(x_rung)`, where `x_rung` is the output of a block. No gradient passes through
    a block, so nothing of the ViT is kept for the backward but the outputs that are read.

    Args:
        dim: the ViT's width.
        width: of each adapter.
        rungs: the blocks that are read, rising; the ViT ends with the last of them.
    """

    def __init__(self, dim: int, width: int, rungs: tuple[int, ...]) -> None:
        super().__init__()
        self.rungs = rungs
        self.adapters = nn.ModuleList(Adapter(dim, width) for _ in rungs)

    def forward(self, outputs: list[Tensor], shape: VideoShape, run: Run | None = None) -> Tensor:
        """Return the sum for the outputs of the blocks that are read, each `[videos * chunks, t*h*w, C]`.

        `run` calls an adapter's branch, which may be computed again in the backward; None: it is called as it is.
        """
        x = outputs[-1]
        for adapter, rung in zip(self.adapters, outputs):
            assert isinstance(adapter, Adapter)
            x = x + (adapter.branch(rung, shape) if run is None else run(adapter.branch, rung, shape))
        return x  # [videos * chunks, t*h*w, C]


def _start_as_identity(down: nn.Linear, up: nn.Linear) -> None:
    """Set an adapter's projections so that it adds nothing yet: `up` is zero."""
    nn.init.trunc_normal_(down.weight, std=0.02)
    nn.init.zeros_(up.weight)
    for layer in (down, up):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class AdaptedTransformer(Protocol):
    """A video transformer as far as adapters need to know it: its sizes and its blocks."""

    config: VitConfig
    blocks: nn.ModuleList
    ladders: nn.Module | None
    fc_norm: nn.Module | None


def add_adapters(vit: AdaptedTransformer, config: AdapterConfig) -> None:
    """Put an adapter at the end of the chosen blocks of `vit`, or a ladder beside them, in place.

    Raises:
        TensorkeepError: A block index does not exist.
    """
    dim, depth = vit.config.embed_dim, vit.config.depth
    width = int(dim * config.ratio)
    chosen = tuple(range(depth)) if config.blocks is None else config.blocks
    for index in chosen:
        if not 0 <= index < depth:
            raise TensorkeepError(f"there is no block {index}: the ViT has {depth}", where="adapter.blocks")
    if config.kind == "ladder":
        vit.ladders = Ladder(dim, width, tuple(sorted(set(chosen))))
        for block in vit.blocks:
            setattr(block, "drop_path", 0.0)  # noqa: B010  # nothing of it trains
        vit.fc_norm = None  # OpenTAD's has none
        return
    for index in chosen:
        vit.blocks[index].adapter = _make_adapter(config, dim, width)


def _make_adapter(config: AdapterConfig, dim: int, width: int) -> nn.Module:
    """Make one adapter; `dim` is the ViT's width C, `width` the adapter's own r."""
    if config.kind == "tia":
        return Adapter(dim, width)
    if config.kind == "plain":
        return PlainAdapter(dim, width)
    return QLoRAAdapter(dim, width, config.lora_r, config.lora_alpha, config.lora_dropout, config.quantize_bits)


def add_lora(vit: AdaptedTransformer, config: LoraConfig) -> None:
    """Wrap the named linears of every block with `LoRALinear`, in place; the q and v biases stay outside and survive.

    Raises:
        TensorkeepError: A name is no linear of a block.
    """
    unknown = sorted(set(config.targets) - set(LORA_TARGETS))
    if unknown:
        raise TensorkeepError(
            f"no linear named {', '.join(unknown)} in a block",
            where="lora.targets",
            hint=near_misses(unknown[0], LORA_TARGETS) or f"choose among {', '.join(LORA_TARGETS)}",
        )
    for block in vit.blocks:
        for target in config.targets:
            parent_name, name = target.split(".")
            parent = block.get_submodule(parent_name)
            linear = LoRALinear(getattr(parent, name), config.lora_r, config.lora_alpha, config.lora_dropout)
            setattr(parent, name, linear)


def set_trainable(vit: nn.Module, tuning: Tuning) -> None:
    """Decide which backbone weights train: `adapter` (adapters and LoRA), `all`, or `none`.

    `fc_norm` never trains: no feature map passes through it; nor does a table of positions. The frozen bases under LoRA
    stay frozen in each case.
    """
    for name, parameter in vit.named_parameters():
        parts = name.split(".")
        if tuning == "none" or "base" in parts or parts[0] in ("fc_norm", "pos_embed"):
            parameter.requires_grad_(False)
        elif tuning == "adapter":
            parameter.requires_grad_(is_added(name))


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the frozen floating parameters to `dtype`, in place; they are computed with in it. Others stay."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
