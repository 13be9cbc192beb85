"""The detector: video backbone, projection, neck and head in one module, built from one frozen config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.detection.backbones import backbone_module
from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.adapters import add_adapters, add_lora, cast_frozen, set_trainable
from tensorkeep.detection.model.config import BackboneConfig, DetectorConfig, is_added
from tensorkeep.detection.model.head import Head, Losses, Neck, Predictions
from tensorkeep.detection.model.layers import VideoBackbone
from tensorkeep.detection.model.resize import linear_resize
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import read_section
from tensorkeep.training.schema import from_mapping


def read_detector_config(path: str | Path) -> DetectorConfig:
    """Read the `model` section of a recipe.

    Args:
        path: a YAML file.

    Returns:
        The shape of a detector.

    Raises:
        TensorkeepError: The file cannot be read, or a value does not fit; file and key are named.

    Example:
        >>> read_detector_config("adatad_thumos_videomae_s").head.classes  # doctest: +SKIP
        20
    """
    return read_section(path, "model", DetectorConfig)


def build_backbone(config: BackboneConfig) -> Any:
    """Build a `VideoBackbone` with its adapters and LoRA, and decide what of it trains."""
    vit = backbone_module(config.kind).Backbone(config.network, config.checkpointing)
    if config.adapter is not None:
        add_adapters(vit, config.adapter)
    if config.lora is not None:
        add_lora(vit, config.lora)
    set_trainable(vit, config.tuning)
    if config.freeze_norms:
        for norm in vit.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.requires_grad_(False)
    return vit


def video_features(vit: VideoBackbone, frames: Tensor, length: int) -> Tensor:
    """Turn frames into features with a video network.

    The frames are cut into chunks, encoded, averaged over space, joined in time and resampled linearly.

    Args:
        vit: the backbone.
        frames: `[B, 3, T, H, W]`, 0..255.
        length: grid steps that are wanted.

    Returns:
        `[B, C, length]`, float32.

    Raises:
        TensorkeepError: T is no multiple of the network's chunk of frames.
    """
    batch, channels, total, height, width = frames.shape
    size = vit.config.chunk_frames or total
    if total % size:
        what = f"{total} frames are not a multiple of the chunk of {size}"
        raise TensorkeepError(what, where="detector", hint=f"take windows of a multiple of {size} frames")
    chunks = frames.reshape(batch, channels, total // size, size, height, width).transpose(1, 2).flatten(0, 1)
    maps = vit(chunks, batch)  # [B * chunks, C, t, h, w]
    pooled = maps.mean((3, 4), dtype=torch.float32)  # [B * chunks, C, t]
    joined = pooled.view(batch, -1, *pooled.shape[1:]).transpose(1, 2).flatten(2)  # [B, C, T / 2]
    return linear_resize(joined, length)


def padded_length(length: int, config: DetectorConfig, training: bool = False) -> int:
    """Return the grid steps that features of `length` steps are padded to, which the kind of detector says."""
    found: int = kinds.module(config.kind).padded_length(length, config, training)
    return found


class Detector(nn.Module):
    """Temporal action detector: from frames or features to raw predictions, and the loss on them.

    Args:
        config: shapes of its parts.

    Example:
        >>> from tensorkeep.detection.model.config import HeadConfig, ProjectionConfig
        >>> config = DetectorConfig(ProjectionConfig(8, 16, branch_layers=1, max_length=16),
        ...                         HeadConfig(2, 16, strides=(1, 2), ranges=((0, 4), (4, 99))))
        >>> out = Detector(config).eval()(torch.zeros(1, 8, 12), torch.ones(1, 12, dtype=torch.bool))
        >>> [x.shape[-1] for x in out.logits]
        [16, 8]
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone: VideoBackbone | None = None if config.backbone is None else build_backbone(config.backbone)
        projection, head = kinds.module(config.kind).build(config)
        self.projection: nn.Module = projection
        self.neck = Neck(config.projection.channels, len(config.head.strides), config.neck)
        self.head: Head = head
        if self.backbone is not None and config.backbone is not None:
            cast_frozen(self.backbone, getattr(torch, config.backbone.frozen_dtype))

    def features(self, inputs: Tensor) -> Tensor:
        """Return features `[B, C, T]` float32 of frames `[B, 3, T', H, W]`; features `[B, C, T]` stay as they are."""
        if self.backbone is None or self.config.backbone is None:
            return inputs
        backbone = self.config.backbone
        # a backbone held in half precision computes in it; autocast would put its norms and residuals in float32
        half = backbone.frozen_dtype != "float32"
        with torch.autocast(inputs.device.type, enabled=not half and torch.is_autocast_enabled(inputs.device.type)):
            return video_features(self.backbone, inputs, backbone.output_length)

    def forward(self, inputs: Tensor, mask: Tensor) -> Predictions:
        """Predict from frames or features.

        Args:
            inputs: frames `[B, 3, T', H, W]` 0..255, or features `[B, C, T]`.
            mask: `[B, T]`, True for valid grid steps.

        Raises:
            TensorkeepError: The mask is not as long as the features, or T' no multiple of the ViT's chunk.
        """
        x = self.features(inputs)  # [B, C, T]
        if mask.shape[-1] != x.shape[-1]:
            what = f"the mask has {mask.shape[-1]} steps, the features {x.shape[-1]}"
            raise TensorkeepError(what, where="detector", hint="a mask counts grid steps, not frames")
        more = padded_length(x.shape[-1], self.config, self.training) - x.shape[-1]
        x, mask = F.pad(x, (0, more)), F.pad(mask.bool(), (0, more))  # [B, C, T + more], [B, T + more]
        levels, masks = self.projection(x, mask)  # per level [B, C', T_l], [B, T_l]
        predictions: Predictions = self.head(self.neck(levels), masks)
        return predictions

    def loss(self, predictions: Predictions, segments: list[Tensor], labels: list[Tensor]) -> Losses:
        """Return the losses of one batch; arguments as in `Head.loss`."""
        return self.head.loss(predictions, segments, labels)


class ParameterCount(NamedTuple):
    """Numbers of parameters (elements)."""

    total: int
    trainable: int


def count_parameters(module: nn.Module) -> dict[str, ParameterCount]:
    """Count parameters by part: each child of `module`, `backbone` split into `vit` and `adapter`, and `total`.

    Args:
        module: a detector, on any device.

    Returns:
        Part -> numbers of its elements, all and those that train.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     count_parameters(Detector(config))["adapter"].trainable
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        first = name.partition(".")[0]
        part = ("adapter" if is_added(name) else "vit") if first == "backbone" else first
        for key in (part, "total"):
            entry = counts.setdefault(key, [0, 0])
            entry[0] += parameter.numel()
            entry[1] += parameter.numel() if parameter.requires_grad else 0
    return {key: ParameterCount(*value) for key, value in counts.items()}


def build_detector(config: DetectorConfig | Mapping[str, Any], device: str | torch.device = "cpu") -> Detector:
    """Build a detector with random weights.

    Args:
        config: its shape, or a recipe's `model` section as nested dicts.
        device: where it is to be.

    Returns:
        The detector, in training mode.

    Raises:
        TensorkeepError: A value of `config` does not fit.

    Example:
        >>> detector = build_detector(read_detector_config("recipe.yaml"), "cuda")  # doctest: +SKIP
    """
    if isinstance(config, Mapping):
        config = from_mapping(DetectorConfig, config, "model")
    with torch.device(device):
        detector = Detector(config)
    # position tables are computed on the CPU, in float64, wherever the weights are made
    return detector if torch.device(device).type == "meta" else detector.to(device)
