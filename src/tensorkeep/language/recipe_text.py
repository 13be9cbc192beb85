"""Language recipes as text: read strictly, changed by `--name value`, written so that reading gives the same recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.training.recipe import Remark, plain, read_document, recipe_of

# one spelling everywhere; in a language recipe they live here
SHORT = {
    "lora_r": "adapter.lora_r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "quantize_aware": "adapter.quantize_aware",
    "quantize_backbone": "training.quantize_backbone",
    "quantize_compute": "training.quantize_compute",
}
# what may differ between two starts of a run, by section: where its tokens are kept
FREE = {"data": ("cache",)}


def read_language(
    path: str | Path, changes: Iterable[tuple[str, str]] = (), remark: Remark = lambda _: None
) -> LanguageRecipe:
    """Read a language recipe from a YAML file, or a shipped one by its name.

    Args:
        path: The file, or the name.
        changes: `(name, text)` made first: a dotted name or a short name, and YAML.
        remark: Told once which fields are called otherwise now.

    Returns:
        The recipe, checked.

    Raises:
        TensorkeepError: Naming the file and the key of anything unknown, missing, unfit or contradictory.
    """
    document, where = read_document(path, "language")
    return language_recipe(document, changes, where, remark)


def language_recipe(
    document: Any,
    changes: Iterable[tuple[str, str]] = (),
    where: str = "recipe",
    remark: Remark = lambda _: None,
) -> LanguageRecipe:
    """Build a language recipe from plain values; the arguments are those of `read_language`.

    >>> document = {"model": "m", "data": {"files": ["a.txt"]}, "training": {"updates": 5}}
    >>> language_recipe(document, [("training.updates", "7"), ("data.files", "b.txt")]).data.files
    ('b.txt',)
    """
    if isinstance(document, Mapping) and document.get("trainable") == "full":
        document = {**document, "trainable": "*"}
    return recipe_of(LanguageRecipe, document, changes, where, _places, tuple(SHORT), remark)


def _places(name: str, value: Any, _document: Any, _where: str) -> list[tuple[str, Any]]:
    return [(SHORT.get(name, name), "*" if (name, value) == ("trainable", "full") else value)]


def kept(recipe: LanguageRecipe) -> dict[str, Any]:
    """Return what a run keeps of its recipe and compares when it is resumed: plain values of all that is not free."""
    document: dict[str, Any] = plain(recipe)
    return document | {s: {k: v for k, v in document[s].items() if k not in names} for s, names in FREE.items()}


def kept_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `kept` would give for a recipe that a checkpoint holds, of this version or an older one."""
    return kept(language_recipe(document, where="the checkpoint's recipe"))
