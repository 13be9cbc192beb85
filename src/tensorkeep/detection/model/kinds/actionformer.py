"""ActionFormer: masked convolutions and transformer blocks over the pyramid, one head for all (Zhang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.detection.model.config import DetectorConfig, ProjectionConfig
from tensorkeep.detection.model.head import Head
from tensorkeep.detection.model.layers import halve_mask as halve_mask
from tensorkeep.detection.model.opentad_sections import expect, file_widths, head_config, neck_config
from tensorkeep.detection.model.projection import Projection

Config = DetectorConfig
OPENTAD = "ActionFormer"


def build(config: DetectorConfig) -> tuple[Projection, Head]:
    """Return projection and head."""
    return Projection(config.projection), Head(config.head, config.projection.channels)


def padded_length(length: int, config: DetectorConfig, training: bool) -> int:
    """Return the grid steps after padding: `max_length`, or above it the next length that every level divides."""
    if length <= config.projection.max_length:
        return config.projection.max_length
    steps = zip(config.head.strides, config.projection.level_windows)
    factor = max(stride * (window // 2) * 2 if window > 1 else stride for stride, window in steps)
    return -(-length // factor) * factor


def from_opentad(model: Mapping[str, Any]) -> DetectorConfig:
    """Translate the `model` dict of an OpenTAD config, all but its backbone."""
    head = head_config(model["rpn_head"], ("ActionFormerHead", "AnchorFreeHead"))
    return DetectorConfig(_projection(model["projection"]), head, neck=neck_config(model))


def _projection(section: Mapping[str, Any]) -> ProjectionConfig:
    """Translate the `projection` dict of a model."""
    where = "model.projection"
    expect(section, "type", ("Conv1DTransformerProj",), where)
    expect(section.get("norm_cfg") or {"type": None}, "type", ("LN",), f"{where}.norm_cfg")
    attention, convolution = section["attn_cfg"], section["conv_cfg"]
    window = attention["n_mha_win_size"]
    embed, stem, branch = section.get("arch", (2, 2, 5))
    rate = section.get("path_pdrop", 0.0)
    return ProjectionConfig(
        **file_widths(section, where),
        embed_layers=embed,
        stem_layers=stem,
        branch_layers=branch,
        kernel_size=convolution["kernel_size"],
        heads=attention["n_head"],
        windows=tuple(window) if isinstance(window, Sequence) else (window,),
        drop_path=rate,
        layer_scale=rate > 0,  # without drop path the original has no layer scale either
        input_dropout=section.get("input_pdrop", 0.0),
        proj_dropout=convolution.get("proj_pdrop", 0.0),
        positions=section.get("use_abs_pe", False),
        max_length=section.get("max_seq_len", 2304),
    )
