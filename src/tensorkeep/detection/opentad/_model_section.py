"""Translate OpenTAD's model, optimizer and scheduler sections (plain dicts) into our settings.

Only what changes a number is read; whatever we do not compute the same way is refused by name, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tensorkeep.detection.model import kinds
from tensorkeep.detection.model.config import (
    AdapterConfig,
    BackboneConfig,
    DetectorConfig,
    SwinConfig,
    Tuning,
    VitConfig,
)
from tensorkeep.detection.model.groups import OptimizerConfig
from tensorkeep.detection.model.opentad_sections import expect
from tensorkeep.detection.recipe.schema import ScheduleConfig
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.migration import backbone_pattern
from tensorkeep.training.sections import GroupRule

Section = Mapping[str, Any]
_ADAPTED = {"VisionTransformerAdapter": "tia", "VisionTransformerLadder": "ladder"}
REVERSIBLE = "SwinTransformer3D_inv"
_BACKBONES = (*_ADAPTED, "VisionTransformer", "VisionTransformerCP", REVERSIBLE)


def detector_config(model: Section) -> DetectorConfig:
    """Translate the `model` dict of an OpenTAD config.

    Raises:
        TensorkeepError: The detector, or a part of it, is not one that is built here; its type is named.
    """
    known = {kinds.module(name).OPENTAD: name for name in kinds.NAMES}
    expect(model, "type", tuple(known), "model")
    found: DetectorConfig = kinds.module(known[model["type"]]).from_opentad(model)
    backbone = model.get("backbone")
    return found if backbone is None else replace(found, backbone=backbone_config(backbone))


def backbone_config(section: Section) -> BackboneConfig:
    """Translate the `backbone` dict of an OpenTAD model: recogniser, pipelines and the ViT inside."""
    where = "model.backbone"
    custom, inner = section.get("custom", {}), section["backbone"]
    expect(inner, "type", _BACKBONES, f"{where}.backbone")
    if inner["type"] == REVERSIBLE:
        return _reversible(section, where)
    if not inner.get("qkv_bias", True) or inner.get("drop_rate") or inner.get("attn_drop_rate"):
        what = "a ViT without q and v biases, or with dropout, is not built here"
        raise TensorkeepError(what, where=f"{where}.backbone")
    adapted = _ADAPTED.get(str(inner["type"]).removeprefix("mmaction."))
    frozen: Tuning = "none" if custom.get("freeze_backbone", False) else ("adapter" if adapted else "all")
    dim, frames = inner["embed_dims"], inner.get("num_frames", 16)
    normalise = section.get("data_preprocessor", {})
    defaults = VitConfig()
    vit = VitConfig(
        image_size=inner.get("img_size", 224),
        patch_size=inner.get("patch_size", 16),
        embed_dim=dim,
        depth=inner["depth"],
        heads=inner["num_heads"],
        mlp_dim=int(dim * inner.get("mlp_ratio", 4)),
        chunk_frames=frames,
        tubelet=inner.get("tubelet_size", 2),
        drop_path=inner.get("drop_path_rate", 0.0),
        eps=inner.get("norm_cfg", {}).get("eps", 1e-6),
        mean=tuple(normalise.get("mean", defaults.mean)),
        std=tuple(normalise.get("std", defaults.std)),
    )
    # OpenTAD's own defaults, should a config not say
    blocks = tuple(inner.get("adapter_index", range(6, 12) if adapted == "ladder" else (3, 5, 7, 11)))
    return BackboneConfig(
        vit=vit,
        adapter=AdapterConfig("ladder" if adapted == "ladder" else "tia", blocks=blocks) if adapted else None,
        tuning=frozen,
        checkpointing="segments" if inner.get("with_cp", False) else "none",
        output_length=_output_length(custom, inner, frames, where),
    )


def _reversible(section: Section, where: str) -> BackboneConfig:
    """Translate the `backbone` dict of Re2TAL's reversible Swin."""
    custom, inner, normalise = section.get("custom", {}), section["backbone"], section.get("data_preprocessor", {})
    depths, modes = tuple(inner.get("depths", (2, 2, 6, 2))), inner.get("inv_mode", ["custom_backprop"])
    odd = not inner.get("qkv_bias", True) or inner.get("drop_rate") or inner.get("attn_drop_rate")
    if odd or not inner.get("patch_norm", False) or inner.get("qk_scale") or inner.get("frozen_stages", -1) >= 0:
        what = "a Swin without biases or patch norm, with dropout, qk_scale or frozen stages, is not built here"
        raise TensorkeepError(what, where=f"{where}.backbone")
    steps = {step["type"]: step for step in custom.get("post_processing_pipeline", ())}
    if set(steps) != {"Reduce", "Interpolate"} or steps["Reduce"].get("reduction") != "mean":
        what = "post_processing_pipeline is not: mean over space, interpolate"
        raise TensorkeepError(what, where=f"{where}.custom")
    defaults = SwinConfig()
    swin = SwinConfig(
        patch=tuple(inner.get("patch_size", (4, 4, 4))),
        channels=inner.get("embed_dim", defaults.channels),
        depths=depths,
        heads=tuple(inner.get("num_heads", defaults.heads)),
        window=tuple(inner.get("window_size", (2, 7, 7))),
        mlp_ratio=float(inner.get("mlp_ratio", defaults.mlp_ratio)),
        drop_path=inner.get("drop_path_rate", defaults.drop_path),
        mean=tuple(normalise.get("mean", defaults.mean)),
        std=tuple(normalise.get("std", defaults.std)),
    )
    return BackboneConfig(
        kind="reversible_swin",
        swin=swin,
        tuning="none" if custom.get("freeze_backbone", False) else "all",
        freeze_norms=custom.get("norm_eval", True),
        checkpointing="none" if set(modes) == {"vanilla"} else "reversible",
        output_length=int(steps["Interpolate"]["size"]),
    )


def _output_length(custom: Section, inner: Section, frames: int, where: str) -> int:
    """Return the grid steps after the pipelines, and refuse pipelines that are not computed the same way here."""
    steps = {step["type"]: step for step in custom.get("post_processing_pipeline", ())}
    chunks = steps.get("Rearrange", {}).get("t1")
    reduced = steps.get("Reduce", {}).get("reduction")
    if reduced != "mean" or chunks is None or set(steps) - {"Reduce", "Rearrange", "Interpolate"}:
        what = "post_processing_pipeline is not: mean over space, join the chunks, interpolate"
        raise TensorkeepError(what, where=f"{where}.custom")
    total = inner.get("total_frames", chunks * frames)
    if total != chunks * frames:
        what = f"total_frames {total} is not {chunks} chunks of {frames} frames"
        raise TensorkeepError(what, where=f"{where}.backbone")
    own = total // inner.get("tubelet_size", 2)
    return int(steps["Interpolate"]["size"]) if "Interpolate" in steps else own


def optimizer_config(optimizer: Section, ladder: bool = False) -> OptimizerConfig:
    """Translate the `optimizer` dict of an OpenTAD config: AdamW with parameter-wise groups.

    `ladder`: whether the adapters are a ladder's; OpenTAD's word is any part of a name, a pattern is whole segments.
    """
    expect(optimizer, "type", ("AdamW",), "optimizer")
    backbone = optimizer.get("backbone", {})
    custom = backbone.get("custom", ())
    rules = [GroupRule(backbone_pattern(rule["name"]), rule["lr"], rule["weight_decay"]) for rule in custom]
    if ladder:
        rules = [replace(rule, pattern="adapters") if rule.pattern == "adapter" else rule for rule in rules]
    if backbone.get("lr") and "backbone" not in backbone.get("exclude", ()):
        rules.append(GroupRule(backbone_pattern(""), backbone["lr"], backbone["weight_decay"]))
    return OptimizerConfig(
        lr=optimizer["lr"],
        weight_decay=optimizer["weight_decay"],
        betas=tuple(optimizer.get("betas", (0.9, 0.999))),
        eps=optimizer.get("eps", 1e-8),
        groups=tuple(rules),
    )


def schedule_config(scheduler: Section, end_epoch: int | None = None) -> tuple[ScheduleConfig, int]:
    """Translate the `scheduler` dict of an OpenTAD config; give also the epochs that are trained.

    `end_epoch` is what the config's workflow says.
    """
    expect(scheduler, "type", ("LinearWarmupCosineAnnealingLR",), "scheduler")
    floor = scheduler.get("eta_min", 1e-8)
    total, trained = scheduler["max_epoch"], end_epoch or scheduler["max_epoch"]
    ends_at = None if total == trained else total
    return ScheduleConfig("opentad", "epochs", scheduler["warmup_epoch"], floor=floor, ends_at=ends_at), trained
