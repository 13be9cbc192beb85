"""Recipes as text: read strictly, written so that reading gives the same recipe, changed by `--name value`.

Short names stand for the places where a recipe keeps them: `--lora_r 8` is the rank of whatever low-rank updates the
recipe has, `--window_size 1024` sets the three lengths that must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from tensorkeep.detection.model.config import DetectorConfig
from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.migration import at
from tensorkeep.training.recipe import Remark, plain, read_document, recipe_of

ADAPTER, LORA = "model.backbone.adapter", "model.backbone.lora"
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout")
SHORT = (
    *_OF_LORA,
    "quantize_bits",
    "quantize_backbone",
    "quantize_compute",
    "use_plain_adapter",
    "window_size",
    "crop_size",
)


def read_recipe(
    path: str | Path, changes: Iterable[tuple[str, str]] = (), remark: Remark = lambda _: None
) -> DetectionRecipe:
    """Read a detection recipe from a YAML file, or a shipped one by its name.

    Args:
        path: The file, or the name.
        changes: `(name, text)` made first: a dotted name or a short name, and YAML.
        remark: Told once which fields are called otherwise now.

    Returns:
        The recipe, checked.

    Raises:
        TensorkeepError: Naming the file and the key of anything unknown, missing, unfit or contradictory.
    """
    document, where = read_document(path, "detection")
    return detection_recipe(document, changes, where, remark)


def detection_recipe(
    document: Any,
    changes: Iterable[tuple[str, str]] = (),
    where: str = "recipe",
    remark: Remark = lambda _: None,
) -> DetectionRecipe:
    """Build a detection recipe from plain values; the arguments are those of `read_recipe`."""
    return recipe_of(DetectionRecipe, document, changes, where, places, SHORT, remark)


def kept_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a recipe that a checkpoint holds, of this version or an older one."""
    made: dict[str, Any] = plain(detection_recipe(document, where="the checkpoint's recipe"))
    return made


def places(name: str, value: Any, document: Any, where: str) -> list[tuple[str, Any]]:
    """Say which dotted paths `name` stands for, each with what is to stand there."""
    if name == "quantize_aware":
        what, hint = "a detector is not trained through a 4-bit format", "quantize_backbone: nf4 holds its backbone so"
        raise TensorkeepError(what, where=f"{where}: quantize_aware", hint=hint)
    if name in ("quantize_backbone", "quantize_compute"):
        return [(f"training.{name}", value)]
    if name == "use_plain_adapter":
        if not isinstance(value, bool):
            raise TensorkeepError(f"use_plain_adapter is true or false, not {value!r}", where=where)
        return [(f"{ADAPTER}.kind", "plain" if value else "qlora")]
    if name == "window_size":
        paths = ["data.window_size"]
        paths += ["model.projection.max_length"] if _pads(document, where) else []
        paths += ["model.backbone.output_length"] if at(document, "model.backbone") else []
        return [(path, value) for path in paths]
    if name == "crop_size":
        paths = ["data.crop_size"] + (["data.augment.size"] if at(document, "data.augment") else [])
        return [(path, value) for path in paths]
    if name not in SHORT:
        return [(name, value)]
    own = at(document, f"{ADAPTER}.kind") == "qlora"
    lora = name in _OF_LORA and at(document, LORA) is not None
    if own is lora:
        what = (
            f"--{name} could mean {ADAPTER}.{name} or {LORA}.{name}" if lora else f"the recipe has nothing with {name}"
        )
        hint = "write the whole name" if lora else f"add {LORA}, or use_plain_adapter: false"
        raise TensorkeepError(what, where=where, hint=hint)
    return [(f"{ADAPTER if own else LORA}.{name}", value)]


def _pads(document: Any, where: str) -> bool:
    """Tell whether the detector of a recipe pads its inputs to a length."""
    if at(document, "model.projection.max_length") is not None:
        return True
    kind = DetectorConfig.variant({"kind": at(document, "model.kind") or "actionformer"}, f"{where}: model")
    (length,) = (f for f in fields(get_type_hints(kind)["projection"]) if f.name == "max_length")
    return length.default is not None
