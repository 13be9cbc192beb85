"""The parts of a detector's training that the loop calls: collate a batch, count its positive points, compute its loss.

The losses are divided by ActionFormer's moving average of positive points (points that learn a segment). It moves once
an update, by the count of the whole global batch, as in the original with one process and no accumulation; so the
shares of micro-batches and ranks add up to the loss of the global batch, however it was split. Positives follow from
the annotations alone: they are counted on the CPU, where batches are made, before any forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.data.batches import collate
from tensorkeep.detection.data.problems import Told
from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.assignment import assign_batch, make_points
from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.model.detector import Detector, padded_length
from tensorkeep.errors import TensorkeepError


def count_positives(masks: Tensor, segments: Sequence[Tensor], labels: Sequence[Tensor], config: DetectorConfig) -> int:
    """Count the points of a batch that learn a segment.

    Args:
        masks: `[B, T]`, True for valid grid steps.
        segments: B tensors `[N, 2]` in grid steps.
        labels: B tensors `[N]` of class numbers.
        config: the detector's shape.
    """
    head = config.head
    masks = F.pad(masks.bool(), (0, padded_length(masks.shape[-1], config, training=True) - masks.shape[-1]))
    levels = [masks]
    for _ in head.strides[1:]:
        levels.append(kinds.module(config.kind).halve_mask(levels[-1]))
    lengths = tuple(level.shape[-1] for level in levels)
    points = make_points(lengths, head.strides, head.ranges, head.point_offset, masks.device)
    classes, _ = assign_batch(points, segments, labels, head.classes, head.centre_radius, head.near_ties)
    return int(((classes.sum(-1) > 0) & torch.cat(levels, 1)).sum())


@dataclass(frozen=True)
class Collate:
    """Put samples together as `clips.collate` does, and count their positive points.

    Attributes:
        config: the detector's shape.
        segments: every sample is filled up to so many segments with ones of no length, which no point learns, so that
            all batches have one shape and the same losses; None: they stay as they are.
    """

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
    """Return the number of positive points that `Collate` counted."""
    return float(batch["positives"])


def telling(remark: Callable[[str], None], notes: set[str]) -> Callable[[Mapping[str, Any]], float]:
    """Return `positives_of` for a run: what its samples were made in spite of goes to `remark`, each thing once.

    Args:
        remark: gets the lines.
        notes: what was told of the run itself.
    """
    told = Told("train", remark, notes=notes)

    def count(batch: Mapping[str, Any]) -> float:
        told(batch["meta"])
        return positives_of(batch)

    return count


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Turns an update's number of positives into the divisor of its losses, and moves the head's average, once.

    The result is a scalar tensor on the head's device, so that nothing waits for it.
    """

    detector: Detector

    def __call__(self, positives: float) -> Any:
        return self.detector.head.update_normalizer(torch.tensor(positives))


@dataclass(frozen=True, eq=False)
class DetectionLoss:
    """Computes the share of a micro-batch in the loss of its update: `loss` = `cls_loss` + `reg_loss`."""

    detector: Detector

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], divisor: float | Tensor) -> dict[str, Tensor]:
        predictions = model(batch["inputs"], batch["masks"])
        head = self.detector.head
        cls_sum, reg_sum, positives = head.loss_sums(predictions, batch["segments"], batch["labels"])
        normalizer = divisor if isinstance(divisor, Tensor) else cls_sum.new_tensor(divisor)
        found = head.weigh(cls_sum, reg_sum, positives, normalizer)
        return {"loss": found.cost, "cls_loss": found.cls_loss, "reg_loss": found.reg_loss}


def launched(config: DetectorConfig) -> str:
    """Say why a training step cannot be recorded as a CUDA graph; "" where nothing is known against it.

    A recomputation that draws random numbers reads the generator's state on the host, which no graph can.

    Args:
        config: the detector's shape.
    """
    backbone = config.backbone
    if backbone is None or backbone.checkpointing == "none":
        return ""
    adapter, lora = backbone.adapter, backbone.lora
    ladder = adapter is not None and adapter.kind == "ladder"
    if ladder or backbone.checkpointing in ("blocks", "attention"):
        what = f"checkpointing {backbone.checkpointing}{' of a ladder' if ladder else ''}"
        return f"{what} keeps random states on the host"
    dropout = lora.lora_dropout if lora is not None else 0.0
    if adapter is not None and adapter.kind == "qlora":
        dropout = max(dropout, adapter.lora_dropout)
    if dropout:
        return f"checkpointing {backbone.checkpointing} draws dropout of {dropout} again, from the host's random states"
    return ""


def refuse_split(config: DetectorConfig, parts: int) -> None:
    """Refuse to split a batch whose two losses are weighed by their ratio: its loss is no sum over parts.

    Raises:
        TensorkeepError: The head weighs by the ratio (`loss_weight` 0 or less) and there is more than one part.
    """
    if config.head.loss_weight <= 0 and parts > 1:
        raise TensorkeepError(
            f"loss_weight {config.head.loss_weight} weighs by the ratio of the losses of a whole batch, which is split "
            f"into {parts} parts",
            where="model.head.loss_weight",
            hint="a positive weight, or one process and no micro_batch",
        )
