"""Neck and head: from the levels of the pyramid to class logits and boundary offsets, and the loss on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.assignment import assign_batch, make_points
from tensorkeep.detection.model.config import HeadConfig, NeckConfig
from tensorkeep.detection.model.layers import ConvModule, LevelScale, channel_norm
from tensorkeep.detection.model.losses import diou_loss, focal_loss, giou_loss, smooth_targets


class Predictions(NamedTuple):
    """Raw outputs for each level l, fine to coarse.

    Attributes:
        logits: `[B, K, T_l]`.
        offsets: `[B, 2, T_l]`, distances to start and end in strides, not negative; `[B, K, 2, T_l]` where each class
            has its own.
        masks: `[B, T_l]`, True where valid.
        points: `[T_l, 4]`: time, shortest and longest distance, stride, in grid steps.
    """

    logits: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]
    points: tuple[Tensor, ...]


class Losses(NamedTuple):
    """Losses of a batch as scalar tensors.

    Attributes:
        cls_loss: of the classes.
        reg_loss: of the boundaries.
        cost: the sum of both, which is minimised.
        positives: number of points that learn a segment.
    """

    cls_loss: Tensor
    reg_loss: Tensor
    cost: Tensor
    positives: Tensor


class Neck(nn.Module):
    """A layer norm (eps 1e-6) for each level, or the group norm of `config`; levels are not mixed."""

    def __init__(self, channels: int, levels: int, config: NeckConfig | None = None) -> None:
        super().__init__()
        norms: list[nn.Module] = [
            nn.LayerNorm(channels, eps=1e-6)
            if config is None
            else nn.GroupNorm(config.groups, channels, affine=config.affine)
            for _ in range(levels)
        ]
        self.norms = nn.ModuleList(norms)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Normalise each level `[B, C, T_l]`."""
        levels = []
        for x, norm in zip(features, self.norms):
            levels.append(channel_norm(x, norm) if isinstance(norm, nn.LayerNorm) else norm(x))  # [B, C, T_l]
        return levels


def refine_segments(points: Tensor, offsets: Tensor) -> Tensor:
    """Turn offsets at points into segments: `(t - left * stride, t + right * stride)`.

    Args:
        points: `[P, 4]`, as `make_points` gives them.
        offsets: `[..., P, 2]` (left, right) in strides.

    Returns:
        `[..., P, 2]` in grid steps.

    Example:
        >>> refine_segments(torch.tensor([[8.0, 0.0, 4.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        tensor([[ 6., 12.]])
    """
    time, stride = points[:, 0], points[:, 3]
    return torch.stack([time - offsets[..., 0] * stride, time + offsets[..., 1] * stride], -1)


def valid_proposals(predictions: Predictions) -> list[tuple[Tensor, Tensor]]:
    """Return segments and scores of each video's valid points, fine to coarse.

    Returns:
        For each video segments in grid steps, `[M, 2]`, or `[M, K, 2]` where each class has its own, and `[M, K]`.
    """
    offsets = torch.cat(predictions.offsets, -1).transpose(-1, -2)  # [B, P, 2] or [B, K, P, 2]
    segments = refine_segments(torch.cat(predictions.points), offsets.float())
    segments = segments.transpose(1, 2) if segments.ndim == 4 else segments
    scores = torch.cat(predictions.logits, 2).transpose(1, 2).float().sigmoid()  # [B, P, K]
    masks = torch.cat(predictions.masks, 1)  # [B, P]
    return [(s[m], p[m]) for s, p, m in zip(segments, scores, masks)]


class Head(nn.Module):
    """Two towers of convolutions, shared by all levels: one for class logits, one for offsets.

    Args:
        config: shape and loss.
        in_channels: channels of the levels.

    Example:
        >>> head = Head(HeadConfig(classes=3, channels=8, strides=(1,), ranges=((0, 10),)), in_channels=8)
        >>> out = head([torch.zeros(1, 8, 4)], [torch.ones(1, 4, dtype=torch.bool)])
        >>> out.logits[0].shape, out.offsets[0].shape
        (torch.Size([1, 3, 4]), torch.Size([1, 2, 4]))
    """

    def __init__(self, config: HeadConfig, in_channels: int, kernel_size: int = 3, distances: int = 2) -> None:
        super().__init__()
        self.config = config
        self.cls_convs, self.reg_convs = (self.tower(in_channels, kernel_size) for _ in range(2))
        self.cls_head = nn.Conv1d(config.channels, config.classes, kernel_size, padding=kernel_size // 2)
        self.reg_head = nn.Conv1d(config.channels, distances, kernel_size, padding=kernel_size // 2)
        self.scale = nn.ModuleList(LevelScale() for _ in config.strides)
        # a float from the start: OpenTAD's is int64 until the first step, and its EMA truncates it by 1 each update
        self.register_buffer("loss_normalizer", torch.tensor(float(config.loss_normalizer)))
        if config.prior > 0 and self.cls_head.bias is not None:
            nn.init.constant_(self.cls_head.bias, -math.log((1 - config.prior) / config.prior))

    def tower(self, in_channels: int, kernel_size: int) -> nn.ModuleList:
        """Return the convolutions of a tower."""
        widths = [in_channels, *[self.config.channels] * self.config.convs][: self.config.convs]
        return nn.ModuleList(ConvModule(width, self.config.channels, kernel_size) for width in widths)

    def forward(self, features: Sequence[Tensor], masks: Sequence[Tensor]) -> Predictions:
        """Predict from features `[B, C, T_l]` and masks `[B, T_l]` of each level; only the towers are masked."""
        logits, offsets = [], []
        for x, mask, scale in zip(features, masks, self.scale):
            classify, regress = x, x  # [B, C, T_l]
            for cls_conv, reg_conv in zip(self.cls_convs, self.reg_convs):
                classify, regress = cls_conv(classify, mask), reg_conv(regress, mask)
            logits.append(self.cls_head(classify))  # [B, K, T_l]
            offsets.append(F.relu(scale(self.reg_head(regress))))  # [B, 2, T_l]
        lengths = tuple(x.shape[-1] for x in features)
        config = self.config
        points = make_points(lengths, config.strides, config.ranges, config.point_offset, features[0].device)
        return Predictions(logits, offsets, list(masks), points)

    def loss(self, predictions: Predictions, segments: Sequence[Tensor], labels: Sequence[Tensor]) -> Losses:
        """Return the losses of one batch, in float32; in training mode the normalizer moves first and is then used.

        Args:
            predictions: of B samples.
            segments: B tensors `[N, 2]` in grid steps; N may be 0.
            labels: B tensors `[N]` of class numbers.
        """
        sums = self.loss_sums(predictions, segments, labels)
        return self.weigh(*sums, self.update_normalizer(sums[2]))

    def targets(
        self, predictions: Predictions, segments: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what points learn: classes `[B, P, K]`, distances `[B, P, 2]`, weights `[B, P]` (None: 1 for all)."""
        config = self.config
        found = assign_batch(
            predictions.points, segments, labels, config.classes, config.centre_radius, config.near_ties
        )
        return (*found, None)

    def loss_sums(
        self, predictions: Predictions, segments: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the focal loss over valid points and the regression loss over positive ones; the third is their number.

        Arguments as in `loss`; the results are scalar tensors.
        """
        config = self.config
        with torch.autocast(predictions.logits[0].device.type, enabled=False):
            logits = torch.cat(predictions.logits, 2).transpose(1, 2).float()  # [B, P, K]
            offsets = torch.cat(predictions.offsets, 2).transpose(1, 2).float()  # [B, P, 2]
            valid = torch.cat(predictions.masks, 1)  # [B, P]
            classes, distances, weights = self.targets(predictions, segments, labels)
            positive = (classes.sum(-1) > 0) & valid  # [B, P]
            targets = smooth_targets(classes, config.label_smoothing)
            focal = focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)  # [B, P, K]
            # weights instead of boolean indexing: no sync with the host, and a deterministic backward
            points = torch.cat(predictions.points)
            distances = torch.where(positive[..., None], distances, 0.0)
            regression = diou_loss if config.regression == "diou" else giou_loss
            each = regression(refine_segments(points, offsets), refine_segments(points, distances))  # [B, P]
            if weights is not None:
                each, focal = each * weights, focal * torch.where(positive, weights, 1.0)[..., None]
            return (focal * valid[..., None]).sum(), (each * positive).sum(), positive.sum()

    @torch.no_grad()
    def update_normalizer(self, positives: Tensor) -> Tensor:
        """Return the divisor of the losses: in training the moving average of counts, which is updated; else the count.

        The average n moves by `n <- m n + (1 - m) max(positives, 1)`, m being `loss_normalizer_momentum`.
        """
        count = positives.clamp(min=1).float()
        if not self.training:
            return count
        state, momentum = self.get_buffer("loss_normalizer"), self.config.loss_normalizer_momentum
        state.copy_(momentum * state + (1 - momentum) * count)
        return state.clone()  # the state may move again before this step's backward

    def weigh(self, cls_sum: Tensor, reg_sum: Tensor, positives: Tensor, normalizer: Tensor) -> Losses:
        """Turn the sums of `loss_sums` into losses.

        Where a batch is spread over ranks or accumulation steps, `normalizer` is that of the global batch.
        """
        cls_loss, reg_loss = cls_sum / normalizer, reg_sum / normalizer
        if self.config.loss_weight > 0:
            reg_loss = reg_loss * self.config.loss_weight
        else:
            reg_loss = reg_loss * (cls_loss.detach() / reg_loss.detach().clamp(min=0.01))
        return Losses(cls_loss, reg_loss, cls_loss + reg_loss, positives)
