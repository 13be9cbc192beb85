"""The detector: video backbone, projection, neck and head in one module, built from one frozen config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.model.adapters import add_adapters, add_lora, cast_frozen, set_trainable
from tensorkeep.detection.model.config import BackboneConfig, DetectorConfig
from tensorkeep.detection.model.head import Head, Losses, Neck, Predictions
from tensorkeep.detection.model.projection import Projection
from tensorkeep.detection.model.resize import linear_resize
from tensorkeep.detection.model.vit import VisionTransformer
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.schema import from_mapping, read_section


def read_detector_config(path: str | Path) -> DetectorConfig:
    """The `model` section of a recipe; raises TensorkeepError naming the file and key of anything that does not fit."""
    return read_section(path, "model", DetectorConfig)


def build_backbone(config: BackboneConfig) -> VisionTransformer:
    """ViT with its adapters and LoRA; what trains is decided here, once."""
    vit = VisionTransformer(config.vit, config.checkpointing)
    if config.adapter is not None:
        add_adapters(vit, config.adapter)
    if config.lora is not None:
        add_lora(vit, config.lora)
    set_trainable(vit, config.tuning)
    return vit


def video_features(vit: VisionTransformer, frames: Tensor, length: int) -> Tensor:
    """Frames `[B, 3, T, H, W]` (0..255) to features `[B, C, length]`, float32.

    Cut into chunks, encoded, averaged over space, joined in time and resampled linearly to `length` grid steps.
    Raises TensorkeepError where T is no multiple of the chunk.
    """
    batch, channels, total, height, width = frames.shape
    size = vit.config.chunk_frames
    if total % size:
        what = f"{total} frames are not a multiple of the chunk of {size}"
        raise TensorkeepError(what, where="detector", hint=f"take windows of a multiple of {size} frames")
    chunks = frames.reshape(batch, channels, total // size, size, height, width).transpose(1, 2).flatten(0, 1)
    maps = vit(chunks, batch)  # [B * chunks, C, t, h, w]
    pooled = maps.mean((3, 4), dtype=torch.float32)  # [B * chunks, C, t]
    joined = pooled.view(batch, -1, *pooled.shape[1:]).transpose(1, 2).flatten(2)  # [B, C, T / 2]
    return linear_resize(joined, length)


def padded_length(length: int, config: DetectorConfig) -> int:
    """Grid steps after padding: `max_length`, or above it the next length that every level divides."""
    if length <= config.projection.max_length:
        return config.projection.max_length
    steps = zip(config.head.strides, config.projection.level_windows)
    factor = max(stride * (window // 2) * 2 if window > 1 else stride for stride, window in steps)
    return -(-length // factor) * factor


class Detector(nn.Module):
    """Frames or features to raw predictions; `loss` on them.

    >>> config = DetectorConfig(ProjectionConfig(8, 16, branch_layers=1, max_length=16),
    ...                         HeadConfig(2, 16, strides=(1, 2), ranges=((0, 4), (4, 99))))
    >>> out = Detector(config).eval()(torch.zeros(1, 8, 12), torch.ones(1, 12, dtype=torch.bool))
    >>> [x.shape[-1] for x in out.logits]
    [16, 8]
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = None if config.backbone is None else build_backbone(config.backbone)
        self.projection = Projection(config.projection)
        self.neck = Neck(config.projection.channels, len(config.head.strides))
        self.head = Head(config.head, config.projection.channels)
        if self.backbone is not None and config.backbone is not None:
            cast_frozen(self.backbone, getattr(torch, config.backbone.frozen_dtype))

    def features(self, inputs: Tensor) -> Tensor:
        """Frames `[B, 3, T, H, W]` through the backbone, or features `[B, C, T]` as they are: `[B, C, T]` float32."""
        if self.backbone is None or self.config.backbone is None:
            return inputs
        backbone = self.config.backbone
        # a backbone held in half precision computes in it; autocast would put its norms and residuals in float32
        half = backbone.frozen_dtype != "float32"
        with torch.autocast(inputs.device.type, enabled=not half and torch.is_autocast_enabled(inputs.device.type)):
            return video_features(self.backbone, inputs, backbone.output_length)

    def forward(self, inputs: Tensor, mask: Tensor) -> Predictions:
        """`inputs` as in `features`, `mask [B, T]` True = valid grid step -> raw predictions per level."""
        x = self.features(inputs)
        if mask.shape[-1] != x.shape[-1]:
            what = f"the mask has {mask.shape[-1]} steps, the features {x.shape[-1]}"
            raise TensorkeepError(what, where="detector", hint="a mask counts grid steps, not frames")
        more = padded_length(x.shape[-1], self.config) - x.shape[-1]
        x, mask = F.pad(x, (0, more)), F.pad(mask.bool(), (0, more))
        levels, masks = self.projection(x, mask)
        predictions: Predictions = self.head(self.neck(levels), masks)
        return predictions

    def loss(self, predictions: Predictions, segments: list[Tensor], labels: list[Tensor]) -> Losses:
        """See `Head.loss`."""
        return self.head.loss(predictions, segments, labels)


class ParameterCount(NamedTuple):
    """Numbers of parameters (elements)."""

    total: int
    trainable: int


def count_parameters(module: nn.Module) -> dict[str, ParameterCount]:
    """Parameters by part: each child of `module`, `backbone` split into `vit` and `adapter`, and `total`.

    Works on the meta device: `with torch.device("meta"): count_parameters(Detector(config))`.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        added = "adapter" in parts or parts[-1] in ("lora_A", "lora_B")
        part = ("adapter" if added else "vit") if parts[0] == "backbone" else parts[0]
        for key in (part, "total"):
            entry = counts.setdefault(key, [0, 0])
            entry[0] += parameter.numel()
            entry[1] += parameter.numel() if parameter.requires_grad else 0
    return {key: ParameterCount(*value) for key, value in counts.items()}


def build_detector(config: DetectorConfig | Mapping[str, Any], device: str | torch.device = "cpu") -> Detector:
    """A detector on `device`, from a config or the mapping of a recipe's `model` section."""
    if isinstance(config, Mapping):
        config = from_mapping(DetectorConfig, config, "model")
    with torch.device(device):
        detector = Detector(config)
    # position tables are computed on the CPU, in float64, wherever the weights are made
    return detector if torch.device(device).type == "meta" else detector.to(device)
