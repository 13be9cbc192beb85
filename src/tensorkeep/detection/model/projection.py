"""ActionFormer's projection: from features `[B, C, T]` to a pyramid of levels, by masked convolutions and attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model._positions import sinusoid_table
from tensorkeep.detection.model.config import ProjectionConfig
from tensorkeep.detection.model.layers import ConvModule, FileConv, ScaledPath, channel_norm, halve_mask
from tensorkeep.detection.model.resize import linear_resize


def halve_max(x: Tensor) -> Tensor:
    """Pool the maximum over time, window 3, stride 2, padding 1: `[B, C, T] -> [B, C, ceil(T / 2)]`.

    Made of selections, which take the first of equals: CUDA's pooling has no deterministic backward.
    """
    padded = F.pad(x, (1, 1), value=-torch.inf)
    half = (x.shape[-1] + 1) // 2
    left, centre, right = (padded[..., k::2][..., :half] for k in range(3))
    best = torch.where(left >= centre, left, centre)
    return torch.where(best >= right, best, right)


def global_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend to all valid keys; `q, k, v` and the result are `[B, heads, T, d]`, `mask [B, T]` is True where valid."""
    seen = mask | ~mask.any(1, keepdim=True)  # an item without a valid key would be NaN, and with it the whole loss
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])


def banded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, window: int) -> Tensor:
    """Let each position attend to valid keys at most `window // 2` away, for any length.

    Shapes as in `global_attention`. Queries are cut into blocks that see their own and the two neighbouring key
    blocks, so memory grows with T, not its square. Rows of invalid queries are finite but without meaning.
    """
    reach, length = window // 2, q.shape[2]
    size = max(reach, 32)
    blocks = -(-length // size)
    tail = blocks * size - length
    batch, heads, _, width = q.shape
    q, k, v = (F.pad(x, (0, 0, 0, tail)).view(batch, heads, blocks, size, width) for x in (q, k, v))
    valid = F.pad(mask, (0, tail)).view(batch, 1, blocks, size, 1)
    k, v, valid = (_with_neighbours(x, reach) for x in (k, v, valid))  # n blocks of size + 2 * reach
    row = torch.arange(size, device=q.device)[:, None]
    column = torch.arange(size + 2 * reach, device=q.device) - reach
    near = (row - column).abs() <= reach
    # a query always sees itself, or the softmax of a row without valid keys would be NaN
    allowed = (near & valid.transpose(-1, -2)) | (row == column)  # [B, 1, n, size, size + 2 * reach]
    q, k, v, allowed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, allowed))  # blocks as batch items
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [B * n, heads, size, d]
    out = out.view(batch, blocks, heads, size, width).transpose(1, 2)
    return out.flatten(2, 3)[:, :, :length]


def _with_neighbours(x: Tensor, reach: int) -> Tensor:
    """Add `reach` rows of the blocks before and after: `[B, h, n, size, d] -> [B, h, n, size + 2 reach, d]`."""
    before = F.pad(x[:, :, :-1, x.shape[3] - reach :], (0, 0, 0, 0, 1, 0))
    after = F.pad(x[:, :, 1:, :reach], (0, 0, 0, 0, 0, 1))
    return torch.cat([before, x, after], 3)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of width 3 over time, without bias, then the mask."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, C, T']` for `x [B, C, T]` and `mask [B, T']`, which has the output's stride already."""
        out: Tensor = self.conv(x)  # [B, C, T']
        return out * mask[:, None].to(out.dtype)  # [B, C, T']


class ConvAttention(nn.Module):
    """Multi-head attention whose q, k, v come from depthwise convolutions; `window > 1` makes it local."""

    def __init__(self, channels: int, heads: int, stride: int, window: int, proj_dropout: float) -> None:
        super().__init__()
        self.heads, self.window, self.proj_dropout = heads, window, proj_dropout
        self.query_conv, self.key_conv, self.value_conv = (DepthwiseConv(channels, stride) for _ in range(3))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(channels) for _ in range(3))
        self.key, self.query, self.value, self.proj = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def _heads(self, x: Tensor) -> Tensor:
        """Split the heads, `[B, C, T] -> [B, heads, T, d]`."""
        return x.view(x.shape[0], self.heads, -1, x.shape[2]).transpose(2, 3)  # [B, heads, T, d]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, C, T']`, zero where invalid, for `x [B, C, T]` and `mask [B, T']` of the output's stride."""
        q = self._heads(self.query(channel_norm(self.query_conv(x, mask), self.query_norm)))  # [B, heads, T', d]
        k = self._heads(self.key(channel_norm(self.key_conv(x, mask), self.key_norm)))
        v = self._heads(self.value(channel_norm(self.value_conv(x, mask), self.value_norm)))
        out = global_attention(q, k, v, mask) if self.window <= 1 else banded_attention(q, k, v, mask, self.window)
        out = self.proj(out.transpose(2, 3).flatten(1, 2))  # [B, C, T']
        return F.dropout(out, self.proj_dropout, self.training) * mask[:, None].to(out.dtype)  # [B, C, T']


class TransformerBlock(nn.Module):
    """Pre-norm block; stride 2 halves the time axis, with max pooling on the skip path."""

    def __init__(self, config: ProjectionConfig, stride: int, window: int) -> None:
        super().__init__()
        channels = config.channels
        self.stride, self.proj_dropout = stride, config.proj_dropout
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = ConvAttention(channels, config.heads, stride, window, config.proj_dropout)
        # the indices of the two convolutions are those of OpenTAD's files
        drops = [nn.Dropout(config.proj_dropout) for _ in range(2)]
        widen, narrow = nn.Conv1d(channels, 4 * channels, 1), nn.Conv1d(4 * channels, channels, 1)
        self.mlp = nn.Sequential(widen, nn.GELU(), drops[0], narrow, drops[1])
        self.drop_path_attn = ScaledPath(channels, config.drop_path, config.layer_scale)
        self.drop_path_mlp = ScaledPath(channels, config.drop_path, config.layer_scale)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x [B, C, T]` and `mask [B, T]` at this block's stride."""
        out_mask = mask if self.stride == 1 else halve_mask(mask)  # [B, T']
        attended = self.attn(channel_norm(x, self.ln1), out_mask)  # [B, C, T']
        skip = x if self.stride == 1 else halve_max(x)  # [B, C, T']
        keep = out_mask[:, None].to(skip.dtype)  # [B, 1, T']
        x = skip * keep + self.drop_path_attn(attended)  # [B, C, T']
        mixed = self.mlp(channel_norm(x, self.ln2))  # [B, C, T']
        return x + self.drop_path_mlp(mixed * keep.to(mixed.dtype)), out_mask


@lru_cache(maxsize=16)
def _positions(max_length: int, channels: int, length: int, device: torch.device) -> Tensor:
    """Return the position table `[1, C, length]`; beyond `max_length` it is stretched."""
    table = sinusoid_table(max_length, channels).transpose(1, 2) / channels**0.5  # [1, C, max_length]
    resized = linear_resize(table, length) if length > max_length else table[..., :length]
    return resized.to(device)


def add_positions(x: Tensor, mask: Tensor, max_length: int) -> Tensor:
    """Add the position table of `max_length` steps to the valid steps of `x [B, C, T]`."""
    table = _positions(max_length, x.shape[1], x.shape[-1], x.device)
    return x + table.to(x.dtype) * mask[:, None].to(x.dtype)


def embedding(in_channels: int, channels: int, layers: int, kernel_size: int) -> nn.ModuleList:
    """Make the convolutions that bring features to a projection's width.

    Args:
        in_channels: of the features.
        channels: of every level.
        layers: how many convolutions.
        kernel_size: of each.

    Returns:
        The convolutions, called one after the other with `x [B, C, T]` and `mask [B, T]`.
    """
    widths = [in_channels, *[channels] * layers][:layers]
    return nn.ModuleList(ConvModule(width, channels, kernel_size) for width in widths)


def file_convs(per_file: Sequence[tuple[int, int]]) -> nn.ModuleList:
    """Make the convolutions that each feature file has of its own; none where `per_file` is empty.

    Args:
        per_file: for each file its channels, and those made of them.

    Returns:
        What `join_files` takes.
    """
    return nn.ModuleList(FileConv(taken, made) for taken, made in per_file)


def join_files(x: Tensor, mask: Tensor, convs: nn.ModuleList, per_file: Sequence[tuple[int, int]]) -> Tensor:
    """Put each file's channels through its own convolution, and what it makes side by side.

    Args:
        x: `[B, C_in, T]`, the channels of the files one after the other.
        mask: `[B, T]`, True where valid.
        convs: of the files; with none `x` stays as it is.
        per_file: for each file its channels, and those made of them.

    Returns:
        `[B, C, T]`.
    """
    if len(convs) == 0:
        return x
    parts = torch.split(x, [taken for taken, _ in per_file], 1)
    return torch.cat([conv(part, mask) for conv, part in zip(convs, parts, strict=True)], 1)


def pyramid(x: Tensor, mask: Tensor, stem: nn.ModuleList, branch: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """Run blocks at full length, then those that halve it each.

    Args:
        x: `[B, C, T]`.
        mask: `[B, T]`, True where valid.
        stem: blocks at full length, called with features and mask.
        branch: blocks that each make the next level.

    Returns:
        Features `[B, C, T_l]` and masks `[B, T_l]` of each level l, fine to coarse.
    """
    for block in stem:
        x, mask = block(x, mask)
    features, masks = [x], [mask]
    for block in branch:
        x, mask = block(x, mask)  # [B, C, T_l], [B, T_l]
        features.append(x)
        masks.append(mask)
    return features, masks


class Projection(nn.Module):
    """Embedding convolutions, stem blocks at full length, and branch blocks that halve it: one output for each level.

    Example:
        >>> config = ProjectionConfig(in_channels=8, channels=16, branch_layers=2, max_length=16)
        >>> features, masks = Projection(config)(torch.zeros(1, 8, 16), torch.ones(1, 16, dtype=torch.bool))
        >>> [f.shape[-1] for f in features]
        [16, 8, 4]
    """

    def __init__(self, config: ProjectionConfig) -> None:
        super().__init__()
        self.config = config
        channels, windows = config.channels, config.level_windows
        self.proj = file_convs(config.per_file)  # its name, and its place before the others, are those of OpenTAD's
        width = channels if config.per_file else config.in_channels
        self.embed = embedding(width, channels, config.embed_layers, config.kernel_size)
        self.stem = nn.ModuleList(TransformerBlock(config, 1, windows[0]) for _ in range(config.stem_layers))
        self.branch = nn.ModuleList(TransformerBlock(config, 2, window) for window in windows[1:])
        for module in self.modules():
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return features `[B, C, T_l]` and masks `[B, T_l]` of each level l, fine to coarse.

        Args:
            x: `[B, C_in, T]`.
            mask: `[B, T]`, True where valid.
        """
        config = self.config
        x = join_files(x, mask, self.proj, config.per_file)
        x = F.dropout1d(x, config.input_dropout, self.training)
        for layer in self.embed:
            x = layer(x, mask)  # [B, C, T]
        if config.positions:
            x = add_positions(x, mask, config.max_length)
        return pyramid(x, mask, self.stem, self.branch)
