"""CausalTAD: each block looks once at the past and once at the future, by a state space and attention (Liu 2024).

The state space (Mamba's selective scan) is computed in float32: in plain PyTorch in chunks of time, which the backward
computes again, or on a GPU with Triton by kernels that keep its states in registers (`_scan_kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.model.head import Head
from tensorkeep.detection.model.layers import ScaledPath
from tensorkeep.detection.model.layers import pool_mask as halve_mask
from tensorkeep.detection.model.opentad_sections import expect, file_widths, head_config, neck_config
from tensorkeep.detection.model.projection import add_positions, embedding, file_convs, halve_max, join_files, pyramid
from tensorkeep.detection.model.projection_checks import check_per_file
from tensorkeep.errors import TensorkeepError

OPENTAD = "VideoMambaSuite"
_STATES = 16  # of each channel of the state space, in all that are published
_CHUNK = 64  # steps of the scan at a time
_DT = (1e-3, 0.1)  # step sizes of the state space at the start


@dataclass(frozen=True)
class CausalConfig:
    """Shape of CausalTAD's projection.

    Attributes:
        in_channels: channels of the features.
        channels: channels of every level.
        embed_layers: convolutions before the blocks.
        stem_layers: blocks at full length.
        branch_layers: blocks that each halve the length.
        kernel_size: of the convolutions before the blocks.
        conv_width: steps of a state space's causal convolution.
        expand: channels inside a block over `channels`.
        heads: of the attention.
        drop_path: rate of stochastic depth; 0 also leaves out the per-channel scale.
        input_dropout: rate on whole channels of the features.
        positions: steps of the fixed position table that is added; null: none.
        max_length: grid steps that shorter inputs are padded to; null: they stay as they are.
        per_file: for each feature file its channels, and those a convolution of its own makes of them; empty: none.
    """

    in_channels: int = 2048
    channels: int = 512
    embed_layers: int = 2
    stem_layers: int = 2
    branch_layers: int = 5
    kernel_size: int = 3
    conv_width: int = 4
    expand: int = 2
    heads: int = 4
    drop_path: float = 0.3
    input_dropout: float = 0.0
    positions: int | None = None
    max_length: int | None = None
    per_file: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_per_file(self.per_file, self.in_channels, self.channels)
        if self.expand < 1 or self.channels * self.expand % self.heads:
            what = f"{self.channels} channels times expand {self.expand} are not a multiple of heads {self.heads}"
            raise TensorkeepError(what, where="projection")


@dataclass(frozen=True)
class Config(DetectorConfig):
    """The `model` section of a recipe with CausalTAD."""

    projection: CausalConfig  # type: ignore[assignment]
    kind: str = "causaltad"


def selective_scan(x: Tensor, step: Tensor, decay: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """Run a linear state space along time: `h_t = exp(step_t decay) h_(t-1) + step_t x_t into_t`, `y_t = out_of_t h_t`.

    Args:
        x: `[B, D, T]`, float32.
        step: `[B, D, T]`, positive.
        decay: `[D, N]`, negative.
        into: `[B, N, T]`.
        out_of: `[B, N, T]`.

    Returns:
        `[B, D, T]`.

    Example:
        >>> ones = torch.ones(1, 1, 3)
        >>> selective_scan(ones, ones, torch.tensor([[-0.6931472]]), ones, ones)
        tensor([[[1.0000, 1.5000, 1.7500]]])
    """
    if x.is_cuda and x.dtype == torch.float32 and decay.shape[1].bit_count() == 1 and _has_triton():
        turned = [t.transpose(1, 2).contiguous() for t in (x, step, into, out_of)]
        fused: Tensor = _FusedScan.apply(decay.contiguous(), *turned)  # type: ignore[no-untyped-call]
        return fused.transpose(1, 2)
    state = x.new_zeros(*x.shape[:2], decay.shape[1])  # [B, D, N]
    parts = []
    for at in range(0, x.shape[-1], _CHUNK):
        cut = [t[..., at : at + _CHUNK] for t in (x, step, into, out_of)]
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_chunk, state, decay, *cut, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(state, decay, *cut)
        parts.append(y)
    return torch.cat(parts, -1)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class _FusedScan(torch.autograd.Function):
    """The scan by Triton's kernels, time before channels; kept for the backward are its inputs and a few states."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor, step: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
        from tensorkeep.detection.model.kinds import _scan_kernels as kernels

        y, kept = kernels.scan(x, step, decay, into, out_of)
        ctx.save_for_backward(decay, x, step, into, out_of, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        from tensorkeep.detection.model.kinds import _scan_kernels as kernels

        decay, x, step, into, out_of, kept = ctx.saved_tensors
        found = kernels.scan_backward(grads[0].contiguous(), x, step, decay, into, out_of, kept)
        return found[2], found[0], found[1], found[3], found[4]


def _scan_chunk(
    state: Tensor, decay: Tensor, x: Tensor, step: Tensor, into: Tensor, out_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan one chunk from `state [B, D, N]`; return its `[B, D, T]` and the state after it."""
    factor = (step[..., None] * decay[:, None]).exp()  # [B, D, T, N]
    added = (step * x)[..., None] * into.transpose(1, 2)[:, None]  # [B, D, T, N]
    states = (states_by_doubling if x.is_cuda else states_in_turn)(state, factor, added)
    return torch.einsum("bdtn,bnt->bdt", states, out_of), states[:, :, -1]


def states_in_turn(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """Return `h_t = factor_t h_(t-1) + added_t`, `[B, D, T, N]`, from `state [B, D, N]`: T small operations."""
    states = []
    for one, more in zip(factor.unbind(2), added.unbind(2)):
        state = torch.addcmul(more, one, state)
        states.append(state)
    return torch.stack(states, 2)


def states_by_doubling(state: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """Return the same by putting runs of 1, 2, 4, ... steps together: log2 T operations on all steps, few launches."""
    first = torch.addcmul(added[:, :, :1], factor[:, :, :1], state[:, :, None])
    added = torch.cat([first, added[:, :, 1:]], 2)
    run, length = 1, added.shape[2]
    while run < length:
        added = torch.cat(
            [added[:, :, :run], torch.addcmul(added[:, :, run:], factor[:, :, run:], added[:, :, :-run])], 2
        )
        factor = torch.cat([factor[:, :, :run], factor[:, :, run:] * factor[:, :, :-run]], 2)
        run *= 2
    return added


class CausalMixer(nn.Module):
    """State space and causal attention over the steps in order, and with the same weights over them in reverse."""

    decayed: ClassVar[tuple[str, ...]] = ("A_log", "D")  # names are those of OpenTAD's files, and of Mamba's

    def __init__(self, channels: int, config: CausalConfig) -> None:
        super().__init__()
        inner, rank = channels * config.expand, math.ceil(channels / 16)
        self.heads, self.rank = config.heads, rank
        self.in_proj = nn.Linear(channels, inner * 8, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_width, groups=inner, padding=config.conv_width - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * _STATES, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, _STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.qkv = nn.Conv1d(inner, 3 * inner, 3, padding=1, groups=inner)
        self.out_proj = nn.Linear(inner * 4, channels, bias=False)
        for conv in (self.conv1d, self.qkv):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = map(math.log, _DT)
        steps = (torch.rand(inner) * (high - low) + low).exp().clamp(min=1e-4)
        with torch.no_grad():  # softplus of the bias is such a step
            self.dt_proj.bias.copy_(steps + (-(-steps).expm1()).log())

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x [B, T, C]` over time; padding is not told apart from other steps."""
        forward, backward = self.in_proj(x).transpose(1, 2).chunk(2, 1)  # each [B, 4 inner, T]
        both = torch.cat([forward, backward.flip(-1)])  # [2 B, 4 inner, T]
        space, attention = both.chunk(2, 1)
        mixed = torch.cat([self._space(space), self._attend(attention)], 1)  # [2 B, 2 inner, T]
        forward, backward = mixed.chunk(2)
        joined = torch.cat([forward, backward.flip(-1)], 1)  # [B, 4 inner, T]
        out: Tensor = self.out_proj(joined.transpose(1, 2))
        return out

    def _space(self, x: Tensor) -> Tensor:
        """Return the gated state space over `x [B, 2 inner, T]`: `[B, inner, T]`."""
        x, gate = x.chunk(2, 1)
        x = F.silu(self.conv1d(x)[..., : x.shape[-1]])  # each step sees itself and those before
        parts = self.x_proj(x.transpose(1, 2))  # [B, T, rank + 2 N]
        step, into, out_of = parts.split([self.rank, _STATES, _STATES], -1)
        step = F.linear(step, self.dt_proj.weight).transpose(1, 2)  # [B, inner, T]
        with torch.autocast(x.device.type, enabled=False):
            step = F.softplus(step.float() + self.dt_proj.bias.float()[:, None])
            into, out_of = into.float().transpose(1, 2), out_of.float().transpose(1, 2)  # [B, N, T]
            y = selective_scan(x.float(), step, -self.A_log.float().exp(), into, out_of)
            y = (y + x.float() * self.D.float()[:, None]) * F.silu(gate.float())
        return y.to(x.dtype)

    def _attend(self, x: Tensor) -> Tensor:
        """Return gated attention of each step to itself and those before, over `x [B, 2 inner, T]`: `[B, inner, T]`."""
        x, gate = x.chunk(2, 1)
        batch, inner, length = x.shape
        q, k, v = self.qkv(x).view(batch, 3, self.heads, inner // self.heads, length).transpose(3, 4).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, d]
        return out.transpose(2, 3).flatten(1, 2) * F.silu(gate)


class CausalBlock(nn.Module):
    """Pre-norm residual block; stride 2 halves the time axis after it by max pooling."""

    def __init__(self, config: CausalConfig, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(config.channels, eps=1e-6)
        self.block = CausalMixer(config.channels, config)
        self.drop_path = ScaledPath(config.channels, config.drop_path, config.drop_path > 0)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x [B, C, T]` and `mask [B, T]` at this block's stride."""
        mixed = self.block(self.norm(x.transpose(1, 2))).transpose(1, 2)  # [B, C, T]
        x = (x + self.drop_path(mixed)) * mask[:, None].to(x.dtype)
        if self.stride == 1:
            return x, mask
        mask = halve_mask(mask)
        return halve_max(x) * mask[:, None].to(x.dtype), mask


class CausalProjection(nn.Module):
    """Embedding convolutions, stem blocks at full length, and branch blocks that halve it: one output for each level.

    Example:
        >>> config = CausalConfig(8, 16, branch_layers=2)
        >>> features, _ = CausalProjection(config)(torch.zeros(1, 8, 13), torch.ones(1, 13, dtype=torch.bool))
        >>> [f.shape[-1] for f in features]
        [13, 7, 4]
    """

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = file_convs(config.per_file)
        width = config.channels if config.per_file else config.in_channels
        self.embed = embedding(width, config.channels, config.embed_layers, config.kernel_size)
        self.stem = nn.ModuleList(CausalBlock(config, 1) for _ in range(config.stem_layers))
        self.branch = nn.ModuleList(CausalBlock(config, 2) for _ in range(config.branch_layers))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return features `[B, C, T_l]` and masks `[B, T_l]` of each level, of `x [B, C_in, T]` and `mask [B, T]`."""
        config = self.config
        x = join_files(x, mask, self.proj, config.per_file)
        x = F.dropout1d(x, config.input_dropout, self.training)
        for layer in self.embed:
            x = layer(x, mask)  # [B, C, T]
        if config.positions is not None:
            x = add_positions(x, mask, config.positions)
        return pyramid(x, mask, self.stem, self.branch)


def build(config: Config) -> tuple[CausalProjection, Head]:
    """Return projection and head."""
    return CausalProjection(config.projection), Head(config.head, config.projection.channels)


def padded_length(length: int, config: Config, training: bool) -> int:
    """Return `max_length` for what is shorter; any length will do."""
    return max(length, config.projection.max_length or 0)


def from_opentad(model: Mapping[str, Any]) -> Config:
    """Translate the `model` dict of an OpenTAD config, all but its backbone."""
    section = model["projection"]
    where = "model.projection"
    expect(section, "type", ("CausalProj",), where)
    expect(section.get("norm_cfg") or {"type": None}, "type", ("LN",), f"{where}.norm_cfg")
    embed, stem, branch = section.get("arch", (2, 2, 5))
    table = section.get("max_seq_len", 2304)
    projection = CausalConfig(
        **file_widths(section, where),
        embed_layers=embed,
        stem_layers=stem,
        branch_layers=branch,
        kernel_size=section["conv_cfg"]["kernel_size"],
        conv_width=section.get("mamba_kernel_size", 4),
        expand=section.get("channel_expand", 2),
        heads=section.get("num_head", 4),
        drop_path=section.get("drop_path_rate", 0.3),
        input_dropout=section.get("input_pdrop", 0.0),
        positions=table if section.get("use_abs_pe", False) else None,
    )
    head = head_config(model["rpn_head"], ("ActionFormerHead", "AnchorFreeHead"))
    return Config(projection, head, neck=neck_config(model))
