"""Recipes as text: one reader of changes, one writer, for both kinds of run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from tensorkeep.errors import TensorkeepError

Places = Callable[[str, Any, Any, str], list[tuple[str, Any]]]


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with strings of invisible characters escaped: it writes U+0085 plainly and reads it as a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(recipe: Any) -> str:
    """The recipe as YAML, every value written out; reading it gives an equal recipe."""
    return yaml.dump(
        plain(recipe), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


def plain(value: Any) -> Any:
    """Dataclasses to dictionaries and tuples to lists, as YAML and JSON have them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _as_written(name: str, value: Any, _document: Any, _where: str) -> list[tuple[str, Any]]:
    return [(name, value)]


def changed(
    document: Any, changes: Iterable[tuple[str, str]], where: str = "recipe", places: Places = _as_written
) -> Any:
    """A copy of a recipe's document with `(name, text)` set: a dotted path, or a short name; text is YAML.

    `places` says which dotted paths a short name stands for, each with what is to stand there. Sections that are not there are made; whether the names exist is found when the recipe is built. Raises
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
        for path, meant in places(name, value, document, where):
            _put(document, path.split("."), meant, f"{where}: {name}")
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
