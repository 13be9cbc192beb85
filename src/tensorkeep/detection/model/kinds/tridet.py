"""TriDet: scalable-granularity perception in place of attention, and the Trident head (Shi et al., CVPR 2023).

A Trident head does not regress a boundary: it predicts where in the `bins` steps before (after) a point the start
(end) lies, as a distribution over these steps, and the offset is its mean. The distribution is a softmax over the sum
of what the point says of each bin, and of what each of those steps says of itself as a start (end) of each class. So
every class has offsets of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.config import DetectorConfig, HeadConfig
from tensorkeep.detection.model.head import Head, Predictions, refine_segments
from tensorkeep.detection.model.layers import ScaledPath, channel_norm
from tensorkeep.detection.model.layers import halve_mask as halve_mask
from tensorkeep.detection.model.losses import diou_loss, focal_loss, giou_loss, smooth_targets
from tensorkeep.detection.model.opentad_sections import expect, extended, head_config, neck_config
from tensorkeep.detection.model.projection import add_positions, embedding, halve_max, pyramid
from tensorkeep.detection.model.projection_checks import check_windows
from tensorkeep.errors import TensorkeepError

OPENTAD = "TriDet"
FIXED = {"pre_nms_thresh": 0.001, "pre_nms_topk": 2000}  # in the code of OpenTAD's, whatever a config says


@dataclass(frozen=True)
class SgpConfig:
    """Shape of TriDet's projection.

    Attributes:
        in_channels: channels of the features.
        channels: channels of every level, a multiple of 16.
        embed_layers: convolutions before the blocks.
        stem_layers: blocks at full length.
        branch_layers: blocks that each halve the length.
        kernel_size: of the convolutions before the blocks.
        mlp_dim: channels inside a block's MLP.
        windows: width of the convolutions of each level in its own steps, stem first (odd; the stem's is 1 whatever its
            entry says, which counts for the length that inputs are padded to); a single number serves every level.
        wide: how many times wider a block's second window is: `round((window + 1) * wide)`, made odd.
        init_std: of the weights of these convolutions at the start.
        pooling: how a block halves the length: the maximum of three steps, or a 1x1 convolution of the mean of two.
        drop_path: rate of stochastic depth in the branch.
        positions: whether a fixed position table is added.
        max_length: grid steps that inputs are padded to, and of the position table; a window in training is not.
        input_noise: standard deviation of noise on the features in training.
    """

    in_channels: int = 2048
    channels: int = 512
    embed_layers: int = 2
    stem_layers: int = 2
    branch_layers: int = 5
    kernel_size: int = 3
    mlp_dim: int = 768
    windows: tuple[int, ...] = (1,)
    wide: float = 5.0
    init_std: float = 0.0
    pooling: Literal["max", "mean"] = "max"
    drop_path: float = 0.1
    positions: bool = False
    max_length: int = 2304
    input_noise: float = 0.0

    def __post_init__(self) -> None:
        check_windows(self.windows, self.branch_layers)
        if even := [window for window in self.windows if window < 1 or window % 2 == 0]:
            raise TensorkeepError(f"window {even[0]} is not odd", where="projection.windows")
        if self.channels % 16:
            what = f"channels {self.channels} is not a multiple of the 16 groups of a block's norm"
            raise TensorkeepError(what, where="projection")

    @property
    def level_windows(self) -> tuple[int, ...]:
        """Window of each level, stem first."""
        return self.windows if len(self.windows) > 1 else self.windows * (1 + self.branch_layers)


@dataclass(frozen=True)
class TridentConfig(HeadConfig):
    """Shape of the Trident head, and how its loss is computed.

    Attributes:
        kernel_size: of the towers for classes and offsets.
        boundary_kernel_size: of the towers for starts and ends.
        bins: steps before and after a point in which a boundary may lie.
        iou_power: the focal loss of a point's own class is multiplied by the GIoU of its segment to this power.
    """

    kernel_size: int = 3
    boundary_kernel_size: int = 3
    bins: int = 16
    iou_power: float = 0.2


@dataclass(frozen=True)
class Config(DetectorConfig):
    """The `model` section of a recipe with TriDet."""

    projection: SgpConfig  # type: ignore[assignment]
    head: TridentConfig
    kind: str = "tridet"


def _depthwise(channels: int, size: int, std: float) -> nn.Conv1d:
    """Return a depthwise convolution whose weights start at a normal distribution, and its bias at zero."""
    conv = nn.Conv1d(channels, channels, size, padding=size // 2, groups=channels)
    nn.init.normal_(conv.weight, 0.0, std)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class SgpBlock(nn.Module):
    """Gate each step by the mean of all, and by its surroundings in two windows; stride 2 first halves the time."""

    def __init__(self, config: SgpConfig, stride: int, window: int, drop_path: float) -> None:
        super().__init__()
        channels = config.channels
        self.stride = stride
        # the second convolution's place is that of OpenTAD's files
        mean = nn.Sequential(nn.Identity(), nn.Conv1d(channels, channels, 1))
        self.downsample = mean if stride == 2 and config.pooling == "mean" else None
        self.ln, self.gn = nn.LayerNorm(channels), nn.GroupNorm(16, channels)
        wide = round((window + 1) * config.wide)
        self.psi, self.convw = (_depthwise(channels, window, config.init_std) for _ in range(2))
        self.convkw = _depthwise(channels, wide + 1 - wide % 2, config.init_std)
        self.fc, self.global_fc = (_depthwise(channels, 1, config.init_std) for _ in range(2))
        widen, narrow = nn.Conv1d(channels, config.mlp_dim, 1), nn.Conv1d(config.mlp_dim, channels, 1)
        self.mlp = nn.Sequential(widen, nn.GELU(), narrow)
        self.drop_path_out = ScaledPath(channels, drop_path, drop_path > 0)
        self.drop_path_mlp = ScaledPath(channels, drop_path, drop_path > 0)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x [B, C, T]` and `mask [B, T]` at this block's stride."""
        if self.stride == 2:
            mask = halve_mask(mask)
            x = halve_max(x) if self.downsample is None else self.downsample(F.avg_pool1d(x, 2))  # [B, C, T / 2]
        normed = channel_norm(x, self.ln)
        surround = (self.convw(normed) + self.convkw(normed)) * self.psi(normed)
        every = F.relu(self.global_fc(normed.mean(-1, keepdim=True)))  # [B, C, 1]
        out = self.fc(normed) * every + surround + normed
        out = x * mask[:, None].to(x.dtype) + self.drop_path_out(out)
        return out + self.drop_path_mlp(self.mlp(self.gn(out))), mask


class SgpProjection(nn.Module):
    """Embedding convolutions, stem blocks at full length, and branch blocks that halve it: one output for each level.

    Example:
        >>> config = SgpConfig(8, 16, branch_layers=2, mlp_dim=8, max_length=16)
        >>> features, _ = SgpProjection(config)(torch.zeros(1, 8, 16), torch.ones(1, 16, dtype=torch.bool))
        >>> [f.shape[-1] for f in features]
        [16, 8, 4]
    """

    def __init__(self, config: SgpConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = embedding(config.in_channels, config.channels, config.embed_layers, config.kernel_size)
        self.stem = nn.ModuleList(SgpBlock(config, 1, 1, 0.0) for _ in range(config.stem_layers))
        self.branch = nn.ModuleList(SgpBlock(config, 2, w, config.drop_path) for w in config.level_windows[1:])

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return features `[B, C, T_l]` and masks `[B, T_l]` of each level, of `x [B, C_in, T]` and `mask [B, T]`."""
        config = self.config
        if self.training and config.input_noise > 0:
            x = x + torch.randn_like(x) * config.input_noise
        for layer in self.embed:
            x = layer(x, mask)  # [B, C, T]
        if config.positions:
            x = add_positions(x, mask, config.max_length)
        return pyramid(x, mask, self.stem, self.branch)


class TridentHead(Head):
    """Four towers: for class logits, for bins, and for starts and ends, whose gradient stops at the levels."""

    config: TridentConfig

    def __init__(self, config: TridentConfig, in_channels: int) -> None:
        super().__init__(config, in_channels, config.kernel_size, 2 * (config.bins + 1))
        size = config.boundary_kernel_size
        self.cls_start_convs, self.cls_end_convs = (self.tower(in_channels, size) for _ in range(2))
        self.cls_start_head, self.cls_end_head = (
            nn.Conv1d(config.channels, config.classes, size, padding=size // 2) for _ in range(2)
        )

    def forward(self, features: Sequence[Tensor], masks: Sequence[Tensor]) -> Predictions:
        """Predict from features `[B, C, T_l]` and masks `[B, T_l]` of each level; offsets are `[B, K, 2, T_l]`."""
        out = super().forward(features, masks)
        offsets = []
        for bins, x, mask in zip(out.offsets, features, masks):
            start, end = x.detach(), x.detach()
            for start_conv, end_conv in zip(self.cls_start_convs, self.cls_end_convs):
                start, end = start_conv(start, mask), end_conv(end, mask)
            offsets.append(self.mean_offsets(bins, self.cls_start_head(start), self.cls_end_head(end)))
        return out._replace(offsets=offsets)

    def mean_offsets(self, bins: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Return offsets `[B, K, 2, T]`, of what points say of bins and what steps say of themselves.

        A point's bins run over steps: for the start from the farthest to its own, for the end from its own on.

        Args:
            bins: `[B, 2 (bins + 1), T]`.
            starts: `[B, K, T]`, of being the start of an action of each class.
            ends: `[B, K, T]`.
        """
        size, length = self.config.bins, starts.shape[-1]
        own = bins.view(len(bins), 2, size + 1, -1).float()  # [B, 2, bins + 1, T]
        sides = []
        for side, x in enumerate((F.pad(starts, (size, 0)), F.pad(ends, (0, size)))):
            near = torch.stack([x[..., k : k + length] for k in range(size + 1)], -2).float()  # [B, K, bins + 1, T]
            part = torch.softmax(near + own[:, None, side], -2)
            steps = torch.arange(size + 1, device=x.device, dtype=torch.float32)
            steps = steps.flip(0) if side == 0 else steps
            sides.append((part * steps[:, None]).sum(-2))  # [B, K, T]
        return torch.stack(sides, 2)

    def loss_sums(
        self, predictions: Predictions, segments: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the losses as `Head.loss_sums`; a point regresses its segment by the offsets of each class it learns."""
        config = self.config
        with torch.autocast(predictions.logits[0].device.type, enabled=False):
            logits = torch.cat(predictions.logits, 2).transpose(1, 2).float()  # [B, P, K]
            offsets = torch.cat(predictions.offsets, -1).permute(0, 1, 3, 2).float()  # [B, K, P, 2]
            valid = torch.cat(predictions.masks, 1)  # [B, P]
            classes, distances, _ = self.targets(predictions, segments, labels)
            positive = (classes.sum(-1) > 0) & valid  # [B, P]
            pairs = ((classes > 0) & positive[..., None]).transpose(1, 2)[..., None]  # [B, K, P, 1]
            # where nothing is learned both are one segment, so that neither loss nor its gradient is odd there
            points = torch.cat(predictions.points)
            wanted = refine_segments(points, torch.where(pairs, distances[:, None], 1.0))  # [B, K, P, 2]
            found = refine_segments(points, torch.where(pairs, offsets, 1.0))
            rate = torch.where(pairs[..., 0], (1 - giou_loss(found, wanted)).clamp(min=1e-8), 1.0)
            targets = smooth_targets(classes, config.label_smoothing)
            focal = focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)  # [B, P, K]
            focal = focal * rate.transpose(1, 2) ** config.iou_power
            each = (diou_loss if config.regression == "diou" else giou_loss)(found, wanted)  # [B, K, P]
            return (focal * valid[..., None]).sum(), (each * pairs[..., 0]).sum(), positive.sum()


def build(config: Config) -> tuple[SgpProjection, TridentHead]:
    """Return projection and head."""
    return SgpProjection(config.projection), TridentHead(config.head, config.projection.channels)


def padded_length(length: int, config: Config, training: bool) -> int:
    """Return `max_length`, or above it the next length that every level divides; in training that next length alone.

    A block takes the mean over all steps, padding included, so its length counts.
    """
    strides, windows = config.head.strides, config.projection.level_windows
    if training:
        return -(-length // max(strides)) * max(strides)
    if length <= config.projection.max_length:
        return config.projection.max_length
    factor = max(stride * max(window, 1) for stride, window in zip(strides, windows))
    return -(-length // factor) * factor


def from_opentad(model: Mapping[str, Any]) -> Config:
    """Translate the `model` dict of an OpenTAD config, all but its backbone."""
    section, rpn = model["projection"], model["rpn_head"]
    where = "model.projection"
    expect(section, "type", ("TriDetProj",), where)
    expect(section.get("norm_cfg") or {"type": None}, "type", ("LN",), f"{where}.norm_cfg")
    embed, stem, branch = section.get("arch", (2, 2, 5))
    pooling = section.get("downsample_type", "max")
    expect({"downsample_type": pooling}, "downsample_type", ("max", "avg"), where)
    projection = SgpConfig(
        in_channels=section["in_channels"],
        channels=section["out_channels"],
        embed_layers=embed,
        stem_layers=stem,
        branch_layers=branch,
        kernel_size=section["conv_cfg"]["kernel_size"],
        mlp_dim=section["sgp_mlp_dim"],
        windows=tuple(section.get("sgp_win_size", (-1,) * 6)),
        wide=section.get("k", 1.5),
        init_std=section.get("init_conv_vars", 1),
        pooling="max" if pooling == "max" else "mean",
        drop_path=section.get("path_pdrop", 0.0),
        positions=section.get("use_abs_pe", False),
        max_length=section.get("max_seq_len", 2304),
        input_noise=section.get("input_noise", 0.0),
    )
    expect(rpn["loss"].get("iou_rate", {}), "type", ("GIOULoss",), "model.rpn_head.loss.iou_rate")
    head = extended(
        head_config(rpn, ("TriDetHead",)),
        TridentConfig,
        kernel_size=rpn.get("kernel_size", 3),
        boundary_kernel_size=rpn.get("boundary_kernel_size", 3),
        bins=rpn.get("num_bins", 16),
        iou_power=rpn.get("iou_weight_power", 0.2),
    )
    return Config(projection, replace(head, near_ties=True), neck=neck_config(model))
