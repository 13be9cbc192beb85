"""Translate OpenTAD's model, optimizer and scheduler sections (plain dicts) into our settings.

Only what changes a number is read; whatever we do not compute the same way is refused by name, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensorkeep.detection.model.config import (
    AdapterConfig,
    BackboneConfig,
    DetectorConfig,
    HeadConfig,
    ProjectionConfig,
    SwinConfig,
    Tuning,
    VitConfig,
)
from tensorkeep.detection.model.groups import OptimizerConfig
from tensorkeep.detection.recipe.schema import ScheduleConfig
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.migration import backbone_pattern
from tensorkeep.training.sections import GroupRule

Section = Mapping[str, Any]
_LOSSES = {"DIOULoss": "diou", "GIOULoss": "giou"}
_ADAPTED = {"VisionTransformerAdapter": "tia", "VisionTransformerLadder": "ladder"}
REVERSIBLE = "SwinTransformer3D_inv"
_BACKBONES = (*_ADAPTED, "VisionTransformer", "VisionTransformerCP", REVERSIBLE)


def detector_config(model: Section) -> DetectorConfig:
    """Translate the `model` dict of an OpenTAD config.

    Raises:
        TensorkeepError: The model is not ActionFormer with or without a VideoMAE backbone.
    """
    _expect(model, "type", ("ActionFormer",), "model")
    neck = model.get("neck", {"type": "FPNIdentity"})
    _expect(neck, "type", ("FPNIdentity",), "model.neck")
    projection = _projection(model["projection"])
    backbone = model.get("backbone")
    return DetectorConfig(projection, _head(model["rpn_head"]), None if backbone is None else backbone_config(backbone))


def _projection(section: Section) -> ProjectionConfig:
    """Translate the `projection` dict of a model."""
    where = "model.projection"
    _expect(section, "type", ("Conv1DTransformerProj",), where)
    _expect(section.get("norm_cfg") or {"type": None}, "type", ("LN",), f"{where}.norm_cfg")
    attention, convolution = section["attn_cfg"], section["conv_cfg"]
    window = attention["n_mha_win_size"]
    embed, stem, branch = section.get("arch", (2, 2, 5))
    rate = section.get("path_pdrop", 0.0)
    return ProjectionConfig(
        in_channels=section["in_channels"],
        channels=section["out_channels"],
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


def _head(section: Section) -> HeadConfig:
    """Translate the `rpn_head` dict of a model."""
    where = "model.rpn_head"
    _expect(section, "type", ("ActionFormerHead", "AnchorFreeHead"), where)
    points, loss = section["prior_generator"], section["loss"]
    _expect(points, "type", ("PointGenerator",), f"{where}.prior_generator")
    _expect(loss["cls_loss"], "type", ("FocalLoss",), f"{where}.loss.cls_loss")
    _expect(loss["reg_loss"], "type", tuple(_LOSSES), f"{where}.loss.reg_loss")
    sampled = section.get("center_sample", "radius") == "radius"
    focal = loss["cls_loss"]
    return HeadConfig(
        classes=section["num_classes"],
        channels=section["feat_channels"],
        convs=section.get("num_convs", 3),
        prior=section.get("cls_prior_prob", 0.01),
        strides=tuple(points["strides"]),
        ranges=tuple((low, high) for low, high in points["regression_range"]),
        point_offset=points.get("use_offset", False),
        centre_radius=section.get("center_sample_radius", 1.5) if sampled else None,
        near_ties=section.get("filter_similar_gt", True),
        loss_normalizer=section.get("loss_normalizer", 100),
        loss_normalizer_momentum=section.get("loss_normalizer_momentum", 0.9),
        label_smoothing=section.get("label_smoothing", 0.0),
        focal_alpha=focal.get("alpha", 0.25),
        focal_gamma=focal.get("gamma", 2.0),
        regression="diou" if loss["reg_loss"]["type"] == "DIOULoss" else "giou",
        loss_weight=section.get("loss_weight", 1.0),
    )


def backbone_config(section: Section) -> BackboneConfig:
    """Translate the `backbone` dict of an OpenTAD model: recogniser, pipelines and the ViT inside."""
    where = "model.backbone"
    custom, inner = section.get("custom", {}), section["backbone"]
    _expect(inner, "type", _BACKBONES, f"{where}.backbone")
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
    _expect(optimizer, "type", ("AdamW",), "optimizer")
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
    _expect(scheduler, "type", ("LinearWarmupCosineAnnealingLR",), "scheduler")
    floor = scheduler.get("eta_min", 1e-8)
    total, trained = scheduler["max_epoch"], end_epoch or scheduler["max_epoch"]
    ends_at = None if total == trained else total
    return ScheduleConfig("opentad", "epochs", scheduler["warmup_epoch"], floor=floor, ends_at=ends_at), trained


def _expect(section: Section, key: str, known: tuple[str, ...], where: str) -> None:
    """Raise TensorkeepError where a key holds none of the known values."""
    value = section.get(key)
    # mmaction's registry prefix
    bare = value.removeprefix("mmaction.") if isinstance(value, str) else value
    if bare not in known:
        hint = f"known: {', '.join(known)}"
        raise TensorkeepError(f"{key} {value!r} is not one that is built here", where=where, hint=hint)
