"""What the training loop asks of a detector: what a batch counts, what its losses are divided by, and its losses.

The divisor is ActionFormer's moving average of positive points. It moves once an update, by the count of the whole
global batch, as in the original with one process and no accumulation; so the shares of micro-batches and ranks add up
to the loss of the global batch, however it was split. Positives follow from the annotations alone: they are counted
on the CPU, where batches are made, before any forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.data.clips import collate
from tensorkeep.detection.model.assignment import assign_batch, make_points
from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.model.detector import Detector, padded_length
from tensorkeep.detection.model.layers import halve_mask
from tensorkeep.detection.model.schedule import ScheduleConfig, learning_rate
from tensorkeep.errors import TensorkeepError


def count_positives(masks: Tensor, segments: Sequence[Tensor], labels: Sequence[Tensor], config: DetectorConfig) -> int:
    """Points that learn a segment: `masks [B, T]`, `segments[b] [N, 2]` and `labels[b] [N]` on the feature grid."""
    head = config.head
    masks = F.pad(masks.bool(), (0, padded_length(masks.shape[-1], config) - masks.shape[-1]))
    levels = [masks]
    for _ in head.strides[1:]:
        levels.append(halve_mask(levels[-1]))
    lengths = tuple(level.shape[-1] for level in levels)
    points = make_points(lengths, head.strides, head.ranges, head.point_offset, masks.device)
    classes, _ = assign_batch(points, segments, labels, head.classes, head.centre_radius, head.near_ties)
    return int(((classes.sum(-1) > 0) & torch.cat(levels, 1)).sum())


@dataclass(frozen=True)
class Collate:
    """`clips.collate`, and `positives`: what the batch adds to the count of its update. With `segments` every sample holds
    so many, filled up with segments of no length, which no point learns: batches of one shape, and the same losses."""

    config: DetectorConfig
    segments: int | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)
        found = count_positives(batch["masks"], batch["segments"], batch["labels"], self.config)
        if self.segments is not None:
            most = max(map(len, batch["labels"]))
            if most > self.segments:
                raise TensorkeepError(
                    f"a sample holds {most} segments, there is room for {self.segments}", where="data"
                )
            batch["segments"] = [F.pad(s, (0, 0, 0, self.segments - len(s))) for s in batch["segments"]]
            batch["labels"] = [F.pad(y, (0, self.segments - len(y))) for y in batch["labels"]]
        return {**batch, "positives": found}


def positives_of(batch: Mapping[str, Any]) -> float:
    """What `Collate` counted."""
    return float(batch["positives"])


@dataclass(frozen=True, eq=False)
class Normalizer:
    """The divisor of an update from its count of positives: moves the head's buffer, once. Gives a scalar tensor on the
    head's device, so that nobody waits for it."""

    detector: Detector

    def __call__(self, positives: float) -> Any:
        return self.detector.head.update_normalizer(torch.tensor(positives))


@dataclass(frozen=True, eq=False)
class DetectionLoss:
    """Share of a micro-batch in the loss of its update: `loss` = `cls_loss` + `reg_loss`."""

    detector: Detector

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], divisor: float | Tensor) -> dict[str, Tensor]:
        predictions = model(batch["inputs"], batch["masks"])
        head = self.detector.head
        cls_sum, reg_sum, positives = head.loss_sums(predictions, batch["segments"], batch["labels"])
        normalizer = divisor if isinstance(divisor, Tensor) else cls_sum.new_tensor(divisor)
        found = head.weigh(cls_sum, reg_sum, positives, normalizer)
        return {"loss": found.cost, "cls_loss": found.cls_loss, "reg_loss": found.reg_loss}


def refuse_split(config: DetectorConfig, parts: int) -> None:
    """Raise where a global batch is split though its loss is no sum: the two losses are weighed by their ratio."""
    if config.head.loss_weight <= 0 and parts > 1:
        raise TensorkeepError(
            f"loss_weight {config.head.loss_weight} weighs by the ratio of the losses of a whole batch, which is split "
            f"into {parts} parts",
            where="model.head.loss_weight",
            hint="a positive weight, or one process and no micro_batch",
        )


@dataclass(frozen=True)
class Schedule:
    """Learning rate of update 0, 1, ...: linear warm-up, then a cosine; `per_epoch`: updates an epoch, a fraction
    where an epoch does not end with an update."""

    config: ScheduleConfig
    per_epoch: float

    def __call__(self, update: int, base: float) -> float:
        warmup, total = (round(epochs * self.per_epoch) for epochs in (self.config.warmup_epochs, self.config.epochs))
        return learning_rate(update, base, min(warmup, max(total, 1) - 1), max(total, 1), self.config.floor)
