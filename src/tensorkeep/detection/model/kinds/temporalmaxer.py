"""TemporalMaxer: no mixing of time steps but the maximum of neighbours from level to level (Tang et al. 2023).

Its head is ActionFormer's, with targets that also look at the predictions: of several segments that a point may learn
it regresses the one whose cost, focal loss of the class plus DIoU of the offsets, is lowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.assignment import assign_targets
from tensorkeep.detection.model.config import DetectorConfig, HeadConfig
from tensorkeep.detection.model.head import Head, Predictions
from tensorkeep.detection.model.layers import pool_mask as halve_mask
from tensorkeep.detection.model.losses import focal_loss
from tensorkeep.detection.model.opentad_sections import expect, extended, file_widths, head_config, neck_config
from tensorkeep.detection.model.projection import embedding, file_convs, halve_max, join_files
from tensorkeep.detection.model.projection_checks import check_per_file
from tensorkeep.errors import TensorkeepError

OPENTAD = "TemporalMaxer"


@dataclass(frozen=True)
class MaxerConfig:
    """Shape of TemporalMaxer's projection.

    Attributes:
        in_channels: channels of the features.
        channels: channels of every level.
        embed_layers: convolutions before the pooling.
        branch_layers: how often the length is halved.
        kernel_size: of the convolutions.
        input_dropout: rate on whole channels of the features.
        max_length: grid steps that shorter inputs are padded to; null: they stay as they are.
        per_file: for each feature file its channels, and those a convolution of its own makes of them; empty: none.
    """

    in_channels: int = 2048
    channels: int = 512
    embed_layers: int = 2
    branch_layers: int = 5
    kernel_size: int = 3
    input_dropout: float = 0.0
    max_length: int | None = None
    per_file: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_per_file(self.per_file, self.in_channels, self.channels)


@dataclass(frozen=True)
class MatchedConfig(HeadConfig):
    """Shape of the detection head, and how points are matched with segments.

    Attributes:
        iou_weight: of the offsets in the cost of a point and a segment.
        cls_weight: of the classes in it.
        keep_percent: share of the points inside a segment, those of the lowest cost, whose losses count in full.
        confuse_weight: of the losses of the other points inside it.
    """

    iou_weight: float = 2.0
    cls_weight: float = 1.0
    keep_percent: float = 1.0
    confuse_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.near_ties or self.centre_radius is None:
            what = "points are matched near the centre of a segment, and with all about as long"
            raise TensorkeepError(what, where="head", hint="centre_radius: 1.5, near_ties: true")
        if not 0 <= self.keep_percent <= 1:
            raise TensorkeepError(f"keep_percent {self.keep_percent} is not between 0 and 1", where="head")


@dataclass(frozen=True)
class Config(DetectorConfig):
    """The `model` section of a recipe with TemporalMaxer."""

    projection: MaxerConfig  # type: ignore[assignment]
    head: MatchedConfig
    kind: str = "temporalmaxer"


class MaxerProjection(nn.Module):
    """Embedding convolutions, then the maximum over three steps, which halves the length: one output for each level.

    Example:
        >>> config = MaxerConfig(8, 16, branch_layers=2)
        >>> features, _ = MaxerProjection(config)(torch.zeros(1, 8, 13), torch.ones(1, 13, dtype=torch.bool))
        >>> [f.shape[-1] for f in features]
        [13, 7, 4]
    """

    def __init__(self, config: MaxerConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = file_convs(config.per_file)
        width = config.channels if config.per_file else config.in_channels
        self.embed = embedding(width, config.channels, config.embed_layers, config.kernel_size)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return features `[B, C, T_l]` and masks `[B, T_l]` of each level, of `x [B, C_in, T]` and `mask [B, T]`."""
        x = join_files(x, mask, self.proj, self.config.per_file)
        x = F.dropout1d(x, self.config.input_dropout, self.training)
        for layer in self.embed:
            x = layer(x, mask)  # [B, C, T]
        features, masks = [x], [mask]
        for _ in range(self.config.branch_layers):
            mask = halve_mask(mask)  # [B, T_l]
            x = halve_max(x) * mask[:, None].to(x.dtype)  # [B, C, T_l]
            features.append(x)
            masks.append(mask)
        return features, masks


class MatchedHead(Head):
    """ActionFormer's head whose points regress the segment of the lowest cost."""

    config: MatchedConfig

    @torch.no_grad()
    def targets(
        self, predictions: Predictions, segments: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what points learn: classes `[B, P, K]`, distances `[B, P, 2]`, weights `[B, P]`."""
        points, valid = torch.cat(predictions.points), torch.cat(predictions.masks, 1)
        logits = torch.cat(predictions.logits, 2).transpose(1, 2).float()  # [B, P, K]
        offsets = torch.cat(predictions.offsets, 2).transpose(1, 2).float()  # [B, P, 2]
        found = [self._of_video(points, *of) for of in zip(valid, logits, offsets, segments, labels)]
        classes, distances, weights = (torch.stack(part) for part in zip(*found))
        return classes, distances, weights

    def _of_video(
        self, points: Tensor, valid: Tensor, logits: Tensor, offsets: Tensor, segments: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the points of one video learn."""
        config = self.config
        classes, distances = assign_targets(points, segments, labels, config.classes, config.centre_radius)
        weights = points.new_ones(len(points))
        if len(segments) == 0:
            return classes, distances, weights
        segments = segments.to(points.dtype)
        sides = torch.stack([points[:, :1] - segments[:, 0], segments[:, 1] - points[:, :1]], -1)  # [P, N, 2]
        # segments of no length fill a batch up to one shape: nothing is inside them
        inside = (sides >= 0).all(-1) & valid[:, None] & (segments[:, 1] > segments[:, 0])  # [P, N]
        wanted = F.one_hot(labels.long(), config.classes).to(logits.dtype)  # [N, K]
        pairs = (len(points), len(segments), config.classes)
        cost = config.cls_weight * focal_loss(logits[:, None].expand(pairs), wanted.expand(pairs)).sum(-1)
        cost = cost + config.iou_weight * _offset_cost(offsets[:, None], sides / points[:, 3:].unsqueeze(-1))
        cost = torch.where(inside, cost, torch.inf)
        keep = (inside.sum(0) * config.keep_percent).long()  # [N]
        rank = torch.empty_like(cost, dtype=torch.long)
        order = torch.arange(len(points), device=points.device)[:, None].expand_as(rank)
        rank.scatter_(0, cost.argsort(dim=0, stable=True), order)
        best = (rank < keep).any(1)
        weights = torch.where(inside.any(1) & ~best, config.confuse_weight, weights)
        # the first of equals: which index `min` gives for them is not defined
        number = torch.arange(len(segments), device=points.device)
        chosen = torch.where(cost == cost.min(1, keepdim=True).values, number, len(segments)).min(1).values
        distances = sides.gather(1, chosen[:, None, None].expand(-1, 1, 2)).squeeze(1) / points[:, 3:]
        return classes, distances, weights


def _offset_cost(found: Tensor, wanted: Tensor) -> Tensor:
    """Return `1 - DIoU` of segments by their distances `[..., 2]` to one point inside both."""
    union = found.sum(-1) + wanted.sum(-1)
    inter = torch.minimum(found, wanted).sum(-1)
    enclosing = torch.maximum(found, wanted).sum(-1)
    off = (found[..., 1] - found[..., 0] - wanted[..., 1] + wanted[..., 0]) / 2
    return 1 - inter / (union - inter).clamp(min=1e-8) + (off / enclosing.clamp(min=1e-8)) ** 2


def build(config: Config) -> tuple[MaxerProjection, MatchedHead]:
    """Return projection and head."""
    return MaxerProjection(config.projection), MatchedHead(config.head, config.projection.channels)


def padded_length(length: int, config: Config, training: bool) -> int:
    """Return `max_length` for what is shorter; any length will do."""
    return max(length, config.projection.max_length or 0)


def from_opentad(model: Mapping[str, Any]) -> Config:
    """Translate the `model` dict of an OpenTAD config, all but its backbone."""
    section, rpn = model["projection"], model["rpn_head"]
    where = "model.projection"
    expect(section, "type", ("TemporalMaxerProj",), where)
    expect(section.get("norm_cfg") or {"type": None}, "type", ("LN",), f"{where}.norm_cfg")
    embed, _, branch = section.get("arch", (2, 0, 5))
    projection = MaxerConfig(
        **file_widths(section, where),
        embed_layers=embed,
        branch_layers=branch,
        kernel_size=section["conv_cfg"]["kernel_size"],
        input_dropout=section.get("drop_out", 0.0),
    )
    matching = rpn["assigner"]
    expect(matching, "type", ("AnchorFreeSimOTAAssigner",), "model.rpn_head.assigner")
    head = replace(
        head_config(rpn, ("TemporalMaxerHead",)),
        centre_radius=matching.get("center_radius", 2.5),
        near_ties=True,
    )
    made = extended(
        head,
        MatchedConfig,
        iou_weight=matching.get("iou_weight", 3.0),
        cls_weight=matching.get("cls_weight", 1.0),
        keep_percent=matching.get("keep_percent", 0.65),
        confuse_weight=matching.get("confuse_weight", 0.1),
    )
    return Config(projection, made, neck=neck_config(model))
