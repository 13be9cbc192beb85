"""Language recipes as text: read strictly, changed by `--name value`, written so that reading gives the same recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.training.recipe import changed
from tensorkeep.training.schema import from_mapping

# one spelling everywhere; in a language recipe they live here
SHORT = {
    "lora_r": "adapter.lora_r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "quantize_backbone": "training.quantize_backbone",
}
_LISTS = ("data.files", "evaluation.files", "trainable", "adapter.targets")


def read_language(path: str | Path, changes: Iterable[tuple[str, str]] = ()) -> LanguageRecipe:
    """The recipe of a YAML file, with `changes` (dotted name or short name, YAML text) made first.

    Raises TensorkeepError naming the file and the key of anything unknown, missing, unfit or contradictory.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise TensorkeepError(f"cannot be read as a recipe: {error}", where=path) from error
    return language_recipe(document, changes, str(path))


def language_recipe(document: Any, changes: Iterable[tuple[str, str]] = (), where: str = "recipe") -> LanguageRecipe:
    """A recipe from plain values, with `changes` made first.

    >>> document = {"model": "m", "data": {"files": ["a.txt"]}, "training": {"updates": 5}}
    >>> language_recipe(document, [("training.updates", "7"), ("data.files", "b.txt")]).data.files
    ('b.txt',)
    """
    if not isinstance(document, Mapping):
        raise TensorkeepError("is no recipe: no sections", where=where)
    known = list(names(LanguageRecipe))
    moved = [(SHORT.get(name.replace("-", "_"), name), text) for name, text in changes]
    moved = [("trainable", "['*']") if (n, t) == ("trainable", "full") else (n, t) for n, t in moved]
    for name, _ in moved:
        if name not in known and not name.startswith("config."):
            hint = near_misses(name, [*known, *SHORT]) or near_misses(
                name.rpartition(".")[2], [k.rpartition(".")[2] for k in known]
            )
            raise TensorkeepError(f"no field {name!r}", where=where, hint=hint or "--print-recipe shows all of them")
    made = changed(dict(document), _one_of_two(moved), where)
    for place in _LISTS:  # a single one may stand without brackets
        holder, _, key = place.rpartition(".")
        section = made.get(holder) if holder else made
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = ["*"] if (place, section[key]) == ("trainable", "full") else [section[key]]
    return from_mapping(LanguageRecipe, made, where)


def _one_of_two(changes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Naming updates takes epochs out, and the other way round; so for model and config."""
    out = list(changes)
    for one, other in (("training.updates", "training.epochs"), ("model", "config")):
        for a, b in ((one, other), (other, one)):
            if any(n == a and t != "null" for n, t in changes) and not any(n == b for n, _ in changes):
                out.insert(0, (b, "null"))
    return out


def names(kind: type, prefix: str = "") -> Iterable[str]:
    """Dotted names of every field of a recipe's dataclass, sections included."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        inner = [
            h for h in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(h) and isinstance(h, type)
        ]
        if inner and getattr(hint, "__origin__", None) is not tuple:
            yield from names(inner[0], f"{prefix}{name}.")
