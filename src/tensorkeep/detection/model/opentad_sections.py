"""What kinds of detectors share of OpenTAD's configs: the head and the neck of its `model` dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from tensorkeep.detection.model.config import HeadConfig, NeckConfig
from tensorkeep.errors import TensorkeepError

Section = Mapping[str, Any]
HeadKind = TypeVar("HeadKind", bound=HeadConfig)
_LOSSES = {"DIOULoss": "diou", "GIOULoss": "giou"}


def expect(section: Section, key: str, known: tuple[Any, ...], where: str) -> None:
    """Check that a key holds one of the known values.

    Args:
        section: of a config.
        key: its key.
        known: the values that are built here.
        where: what the error names.

    Raises:
        TensorkeepError: It holds another value, which is named.
    """
    value = section.get(key)
    # mmaction's registry prefix
    bare = value.removeprefix("mmaction.") if isinstance(value, str) else value
    if bare not in known:
        hint = f"known: {', '.join(map(str, known))}"
        raise TensorkeepError(f"{key} {value!r} is not one that is built here", where=where, hint=hint)


def file_widths(section: Section, where: str) -> dict[str, Any]:
    """Translate the channels of a `projection` dict, which are lists where each feature file is projected on its own.

    Args:
        section: the dict.
        where: what the error names.

    Returns:
        `in_channels` and `channels`, and of lists `per_file`.

    Raises:
        TensorkeepError: They are no numbers, nor lists of them of one length.
    """
    taken, made = section["in_channels"], section["out_channels"]
    if isinstance(taken, int) and isinstance(made, int):
        return {"in_channels": taken, "channels": made}
    both = (taken, made)
    whole = all(isinstance(n, int) for each in both if isinstance(each, list | tuple) for n in each)
    if not whole or not all(isinstance(each, list | tuple) for each in both) or len(taken) != len(made):
        what = f"in_channels {taken} and out_channels {made} are not one number each, nor one for each feature file"
        raise TensorkeepError(what, where=where)
    return {"in_channels": sum(taken), "channels": sum(made), "per_file": tuple(zip(taken, made))}


def head_config(section: Section, types: tuple[str, ...]) -> HeadConfig:
    """Translate the `rpn_head` dict of a model.

    Args:
        section: the dict.
        types: types of heads that are computed the same way.

    Returns:
        What every head has.

    Raises:
        TensorkeepError: The type of the head, of its points or of a loss is another.
    """
    where = "model.rpn_head"
    expect(section, "type", types, where)
    points, loss = section["prior_generator"], section["loss"]
    expect(points, "type", ("PointGenerator",), f"{where}.prior_generator")
    expect(loss["cls_loss"], "type", ("FocalLoss",), f"{where}.loss.cls_loss")
    expect(loss["reg_loss"], "type", tuple(_LOSSES), f"{where}.loss.reg_loss")
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
        regression=_LOSSES[loss["reg_loss"]["type"]],  # type: ignore[arg-type]
        loss_weight=section.get("loss_weight", 1.0),
    )


def extended(head: HeadConfig, kind: type[HeadKind], **more: Any) -> HeadKind:
    """Return a head's config as one of a kind that has more fields."""
    return kind(**{field.name: getattr(head, field.name) for field in fields(HeadConfig)} | more)


def neck_config(model: Section) -> NeckConfig | None:
    """Translate the `neck` dict of a model, which is a norm for each level.

    Raises:
        TensorkeepError: It mixes levels, or has another norm.
    """
    where = "model.neck"
    section = model.get("neck", {"type": "FPNIdentity"})
    expect(section, "type", ("FPNIdentity",), where)
    norm = section.get("norm_cfg", {"type": "LN"})
    if norm is None:
        raise TensorkeepError("a neck without a norm is not built here", where=where)
    expect(norm, "type", ("LN", "GN"), f"{where}.norm_cfg")
    if norm["type"] == "LN":
        return None
    expect(norm, "eps", (None, 1e-5), f"{where}.norm_cfg")
    return NeckConfig(norm["num_groups"], norm.get("affine", True))
