"""Recipes as text: read strictly, written so that reading gives the same recipe, changed by `--name value`.

The seeds' short names stand for the places where a recipe keeps them: `--lora_r 8` is the rank of whatever low-rank
updates the recipe has, `--window_size 1024` sets the three lengths that must agree.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tensorkeep.training.schema import from_mapping
from tensorkeep.errors import TensorkeepError
from tensorkeep.detection.recipe.schema import DetectionRecipe

ADAPTER, LORA = "model.backbone.adapter", "model.backbone.lora"
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout")
SHORT = (*OF_LORA, "quantize_bits", "quantize_backbone", "use_plain_adapter", "window_size", "crop_size")


def read_recipe(path: str | Path, changes: Iterable[tuple[str, str]] = ()) -> DetectionRecipe:
    """The recipe of a YAML file, with `changes` (see `changed`) made first.

    Raises TensorkeepError naming the file and the key of anything unknown, missing, unfit or contradictory.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise TensorkeepError(f"cannot be read as a recipe: {error}", where=path) from error
    return from_mapping(DetectionRecipe, changed(document, changes, str(path)), str(path))


def to_yaml(recipe: DetectionRecipe) -> str:
    """The recipe as YAML, every value written out; `read_recipe` of it gives an equal recipe."""
    return yaml.dump(
        plain(recipe), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with strings of invisible characters escaped: it writes U+0085 plainly and reads it as a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def plain(value: Any) -> Any:
    """Dataclasses to dictionaries and tuples to lists, as YAML and JSON have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def changed(document: Any, changes: Iterable[tuple[str, str]], where: str = "recipe") -> Any:
    """A copy of a recipe's document with `(name, text)` set: a dotted path, or one of the short names; text is YAML.

    Sections that are not there are made; whether the names exist is found when the recipe is built. Raises
    TensorkeepError where a name goes through a value, or a short name fits nothing or two places.

    >>> changed({"training": {"seed": 1}}, [("training.seed", "7"), ("training.ema", "null")])
    {'training': {'seed': 7, 'ema': None}}
    """
    document = copy.deepcopy(document)
    for name, text in changes:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise TensorkeepError(f"--{name} {text!r} is no value: {error}", where=where) from error
        for path, meant in _places(name, value, document, where):
            _put(document, path.split("."), meant, f"{where}: {name}")
    return document


def _places(name: str, value: Any, document: Any, where: str) -> list[tuple[str, Any]]:
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
    lora = name in OF_LORA and _at(document, LORA) is not None
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


def _put(holder: Any, path: list[str], value: Any, where: str) -> None:
    """Set `value` at a path through mappings and lists (by number)."""
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(holder, list) and part.isdecimal() and int(part) < len(holder):
            key: Any = int(part)
        elif isinstance(holder, dict):
            key = part
            if not last and holder.get(key) is None:
                holder[key] = {}
        else:
            raise TensorkeepError(f"{'.'.join(path[:depth])} has no {part!r}", where=where)
        if last:
            holder[key] = value
        else:
            holder = holder[key]
