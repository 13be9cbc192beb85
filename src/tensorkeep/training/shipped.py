"""The recipes that are shipped: YAML in `tensorkeep/recipes/KIND/`, named on the command line without a path."""

from __future__ import annotations

from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError, near_misses
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.yaml_documents import LARGEST

KINDS = ("language", "detection")


class Shipped(NamedTuple):
    """A shipped recipe: its name, the kind of run, the first sentence of its comment, and its YAML."""

    name: str
    kind: str
    about: str
    text: str


def shipped() -> list[Shipped]:
    """Return all shipped recipes, language first, by name."""
    found = []
    for kind in KINDS:
        folder = files("tensorkeep") / "recipes" / kind
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            text = file.read_text(encoding="utf-8")
            found.append(Shipped(file.name.removesuffix(".yaml"), kind, _first_sentence(text), text))
    return found


def _first_sentence(text: str) -> str:
    """The first sentence of the comment at the head of a recipe."""
    lines = [line.removeprefix("#").strip() for line in takewhile(lambda line: line[:1] == "#", text.splitlines())]
    return " ".join(lines).partition(". ")[0].rstrip(".")


def shipped_recipe(name: str, kind: str | None = None) -> Shipped:
    """Find a shipped recipe by its name, of one kind or of any.

    Args:
        name: The recipe's name.
        kind: "language" or "detection"; None: any.

    Returns:
        The recipe, as text.

    Raises:
        TensorkeepError: Where there is none, with those that are spelt like it.
    """
    known = {recipe.name: recipe for recipe in shipped() if kind in (None, recipe.kind)}
    if name not in known:
        hint = near_misses(Path(name).stem, known) or "tensorkeep recipe list shows those that are shipped"
        raise TensorkeepError("is neither a file nor a shipped recipe", where=name, hint=hint)
    return known[name]


def recipe_text(path: str | Path, kind: str) -> tuple[str, str]:
    """Read a recipe's text from a file, or from the shipped recipe of that name where there is no such file.

    Args:
        path: A file or a name.
        kind: `language` or `detection`.

    Returns:
        The text, and where it came from.

    Raises:
        TensorkeepError: Where there is neither, or the file cannot be read.
    """
    place = Path(path)
    if not place.exists():
        return shipped_recipe(str(path), kind).text, str(path)
    if place.is_dir():
        own = place / "recipe.yaml"
        hint = f"the run's recipe: {own}" if own.is_file() else "tensorkeep recipe list shows those that are shipped"
        raise TensorkeepError("is a folder, and a recipe is a YAML file", where=path, hint=hint)
    try:
        return read_small(place, LARGEST).decode("utf-8"), str(path)
    except ValueError as error:
        raise TensorkeepError(f"cannot be read as a recipe: {error}", where=path) from error
