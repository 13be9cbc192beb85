"""Recipes as text: read strictly, written so that reading gives the same recipe, changed by `--name value`.

The seeds' short names stand for the places where a recipe keeps them: `--lora_r 8` is the rank of whatever low-rank
updates the recipe has, `--window_size 1024` sets the three lengths that must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tensorkeep.detection.recipe.schema import DetectionRecipe
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import changed
from tensorkeep.training.schema import from_mapping

ADAPTER, LORA = "model.backbone.adapter", "model.backbone.lora"
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout")
SHORT = (*_OF_LORA, "quantize_bits", "quantize_backbone", "use_plain_adapter", "window_size", "crop_size")


def read_recipe(path: str | Path, changes: Iterable[tuple[str, str]] = ()) -> DetectionRecipe:
    """The recipe of a YAML file, with `changes` (see `changed`) made first.

    Raises TensorkeepError naming the file and the key of anything unknown, missing, unfit or contradictory.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise TensorkeepError(f"cannot be read as a recipe: {error}", where=path) from error
    return from_mapping(DetectionRecipe, changed(document, changes, str(path), places), str(path))


def places(name: str, value: Any, document: Any, where: str) -> list[tuple[str, Any]]:
    """Dotted paths that `name` stands for, each with what is to stand there."""
    if name == "quantize_backbone":
        return [("training.quantize_backbone", value)]
    if name == "use_plain_adapter":
        if not isinstance(value, bool):
            raise TensorkeepError(f"use_plain_adapter is true or false, not {value!r}", where=where)
        return [(f"{ADAPTER}.kind", "plain" if value else "qlora")]
    if name == "window_size":
        paths = ["data.window_size", "model.projection.max_length"]
        paths += ["model.backbone.output_length"] if _at(document, "model.backbone") else []
        return [(path, value) for path in paths]
    if name == "crop_size":
        paths = ["data.crop_size"] + (["data.augment.size"] if _at(document, "data.augment") else [])
        return [(path, value) for path in paths]
    if name not in SHORT:
        return [(name, value)]
    seeds = _at(document, f"{ADAPTER}.kind") == "qlora"
    lora = name in _OF_LORA and _at(document, LORA) is not None
    if seeds is lora:
        what = (
            f"--{name} could mean {ADAPTER}.{name} or {LORA}.{name}" if lora else f"the recipe has nothing with {name}"
        )
        hint = "write the whole name" if lora else f"add {LORA}, or use_plain_adapter: false"
        raise TensorkeepError(what, where=where, hint=hint)
    return [(f"{ADAPTER if seeds else LORA}.{name}", value)]


def _at(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document.get(part) if isinstance(document, Mapping) else None
    return document
