"""Recipes as text: one strict reader, one reader of changes, one writer, for both kinds of run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tensorkeep.errors import TensorkeepError, near_misses, shown
from tensorkeep.storage.yaml_documents import parse_yaml
from tensorkeep.training import migration
from tensorkeep.training.migration import Placed
from tensorkeep.training.schema import from_mapping, hints_of
from tensorkeep.training.shipped import recipe_text

T = TypeVar("T")
Places = Callable[[str, Any, Any, str], Placed]
Remark = Callable[[str], None]
# of each pair exactly one is meant: naming one takes the other out, unless it is named, too
_EITHER = (("training.updates", "training.epochs"), ("model", "config"))


# -- reading ----------------------------------------------------------------------------------------------------------


def read_document(path: str | Path, kind: str) -> tuple[Any, str]:
    """Read the YAML of a recipe.

    Args:
        path: A file, or the name of a recipe that is shipped (`smollm2_qlora`); a file that is there wins.
        kind: `language` or `detection`.

    Returns:
        The document as it is written, and where it came from, for errors.

    Raises:
        TensorkeepError: Where there is no such file or name, or where the text is no YAML.
    """
    text, where = recipe_text(path, kind)
    return parse_yaml(text, where), where


def read_section(path: str | Path, section: str, kind: type[T]) -> T:
    """Read one section of a detection recipe.

    Args:
        path: A file or the name of a shipped recipe.
        section: The section's name.
        kind: Its dataclass.

    Returns:
        The section, checked.

    Raises:
        TensorkeepError: Naming the file and key of anything missing, unknown or unfit.
    """
    document, where = read_document(path, "detection")
    document, _ = migration.migrated(document, where)
    if not isinstance(document, Mapping) or section not in document:
        raise TensorkeepError(f"has no section {section!r}", where=where)
    return from_mapping(kind, document[section], f"{where}: {section}")


def recipe_of(
    kind: type[T],
    document: Any,
    changes: Iterable[tuple[str, str]] = (),
    where: str = "recipe",
    places: Places | None = None,
    short: Sequence[str] = (),
    remark: Remark = lambda _: None,
) -> T:
    """Build a recipe from plain values, of this version or an older one.

    Args:
        kind: The recipe's dataclass.
        document: Its sections, as YAML has them.
        changes: `(name, text)` made first: a dotted path or a short name, and YAML.
        where: What errors name.
        places: Which dotted paths a short name stands for, each with what is to stand there.
        short: The short names, for hints.
        remark: Told once what is called otherwise now.

    Returns:
        The recipe, checked.

    Raises:
        TensorkeepError: Naming the key of anything unknown, missing, unfit or contradictory.
    """
    if not isinstance(document, Mapping):
        raise TensorkeepError("is no recipe: no sections", where=where)
    made, said = migration.migrated(document, where)
    changes = [(name.replace("-", "_"), text) for name, text in changes]
    known, sections = set(names(kind)), {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    named = {name for name, _ in changes}

    def placed(name: str, value: Any, document: Any, where: str) -> Placed:
        found = _of_old(name, value, document, said) or (places or _as_written)(name, value, document, where)
        for path, _ in found:
            _refuse_unknown(path, known, short, where)
        there = {path for path, meant in found if meant is not None}
        for pair in _EITHER:
            for one, other in (pair, pair[::-1]):
                if one in there and not {other} & (named | there) and other.partition(".")[0] in sections:
                    found = [(other, None), *found]
        return found

    made = changed(made, changes, where, placed)
    training = made.get("training")
    if isinstance(training, dict) and training.get("updates") is not None:
        training.setdefault("epochs", None)  # a kind may count in epochs where nothing is said
    if said:
        remark(f"{where}: {'; '.join(dict.fromkeys(said))}")
    return from_mapping(kind, made, where)


def _of_old(name: str, value: Any, document: Any, said: list[str]) -> Placed | None:
    """Where a change goes that has an old name; None where it has none."""
    old = migration.old_name(name)
    if old is None:
        return None
    field, rest = old
    if rest:  # a part of an old field: of a rule
        said.append(f"{field} is {migration.OLD[field].now} now")
        return [(migration.OLD[field].now + rest, value)]
    placed = migration.OLD[field].places(value, document)
    said += migration.sentences(field, value, placed)
    return placed


def _refuse_unknown(path: str, known: set[str], short: Sequence[str], where: str) -> None:
    """Refuse a dotted path that is no field, nor goes into the value of one (a list, a config)."""
    parts = path.split(".")
    if path in known or any(".".join(parts[:n]) in known - _sections(known) for n in range(1, len(parts))):
        return
    ends = {name.rpartition(".")[2]: name for name in sorted(known)}
    hint = near_misses(path, [*known, *short]) or near_misses(parts[-1], ends)
    raise TensorkeepError(f"no field {path!r}", where=where, hint=hint or "--print-recipe shows all of them")


def _sections(known: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in known}


def names(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of every field of a recipe's dataclass and its variants, sections included; some come twice."""
    for name, hint in hints_of(kind).items():
        yield prefix + name
        inner = [
            h for h in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(h) and isinstance(h, type)
        ]
        if inner and getattr(hint, "__origin__", None) is not tuple:
            for one in inner[0].variants() if hasattr(inner[0], "variants") else (inner[0],):
                yield from names(one, f"{prefix}{name}.")


# -- changing ---------------------------------------------------------------------------------------------------------


def _as_written(name: str, value: Any, _document: Any, _where: str) -> Placed:
    return [(name, value)]


def changed(
    document: Any, changes: Iterable[tuple[str, str]], where: str = "recipe", places: Places = _as_written
) -> Any:
    """Copy a recipe's document and set `(name, text)` in it: a dotted path, or a short name; text is YAML.

    `places` says which dotted paths a short name stands for, each with what is to stand there. Sections that are not
    there are made; whether the names exist is found when the recipe is built.

    Raises:
        TensorkeepError: Where a name goes through a value, or a short name fits nothing or two places.

    >>> changed({"training": {"seed": 1}}, [("training.seed", "7"), ("training.ema", "null")])
    {'training': {'seed': 7, 'ema': None}}
    """
    document = copy.deepcopy(document)
    for name, text in changes:
        try:
            value = parse_yaml(text, where)
        except TensorkeepError as error:
            raise TensorkeepError(f"--{name} {shown(text)} is no value: {error.what}", where=where) from None
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


# -- writing ----------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with strings of invisible characters escaped: it writes U+0085 plainly and reads it as a space."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(recipe: Any) -> str:
    """Return a recipe as YAML, every value written out; reading it gives an equal recipe.

    Args:
        recipe: A recipe's dataclass.
    """
    return yaml.dump(
        plain(recipe), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


def plain(value: Any) -> Any:
    """Return a value with dictionaries for dataclasses and lists for tuples, as YAML and JSON have them.

    Args:
        value: Nested as you like; other values stay.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
