"""Recipes of older versions, read as this one: one table of what fields were called, for both kinds of run.

A recipe says its `version`; one that does not is of version 1 (tensorkeep 0.1), which had two dialects. What a version
renames is a line of `OLD`, so a run's own recipe, the copies in its checkpoints and old commands go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError

VERSION = 2
Placed = list[tuple[str, Any]]
# names of parameters that are whole segments, so that patterns for them mean what they meant
_SEGMENTS = ("*", "adapter", "lora_A", "lora_B")


class Old(NamedTuple):
    """A field of version 1: what it is called now, and `places(value, recipe)`: new dotted paths with their values."""

    now: str
    places: Callable[[Any, Any], Placed]


def _renamed(now: str) -> Old:
    return Old(now, lambda value, _: [(now, value)])


def _cosine_end(value: Any, recipe: Any) -> Placed:
    """`schedule.epochs` was the cosine's end, and the run's where it had no `stop_epoch`."""
    stopped = at(recipe, "schedule.ends_at") is not None
    return [("schedule.ends_at", value)] if stopped else [("training.epochs", value), ("training.updates", None)]


def _run_end(value: Any, recipe: Any) -> Placed:
    """`schedule.stop_epoch` was the run's end, before the cosine's; null: both are one."""
    end = at(recipe, "schedule.ends_at") or at(recipe, "training.epochs") or 100
    if value is None or value == end:
        return [("training.epochs", end), ("training.updates", None), ("schedule.ends_at", None)]
    return [("training.epochs", value), ("training.updates", None), ("schedule.ends_at", end)]


def _best(value: Any, recipe: Any) -> Placed:
    """Detection called a loss that gets smaller `loss`."""
    return [("training.best", "-loss" if value == "loss" and is_detection(recipe) else value)]


def _clip(value: Any, _: Any) -> Placed:
    return [("training.clip", value or None)]  # 0 was "no clipping"


def _backbone_rules(value: Any, _: Any) -> Placed:
    """Rules for the backbone alone, by a part of the name; what had no decay had 0.05."""
    rules = [_backbone_rule(rule) if isinstance(rule, Mapping) else rule for rule in _list(value)]
    return [("optimizer.groups", rules)]


def _backbone_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in rule.items() if key != "name"}
    return {"pattern": backbone_pattern(str(rule.get("name", ""))), "weight_decay": 0.05, **rest}


def backbone_pattern(word: str) -> str:
    """Return the pattern for every backbone parameter whose name holds a word.

    Args:
        word: the word; empty for all parameters of the backbone.

    >>> backbone_pattern("adapter"), backbone_pattern("lora"), backbone_pattern("norm"), backbone_pattern("")
    ('adapter', 'lora_*', '^backbone.*norm*', '^backbone.*')
    """
    if word in _SEGMENTS:
        return word
    if word == "lora":  # lora_A and lora_B, which the backbone alone has
        return "lora_*"
    return f"^backbone.*{_literal(word)}*" if word else "^backbone.*"


def backbone_word(pattern: str) -> str:
    """Return the word that `backbone_pattern` made a pattern of.

    Args:
        pattern: what it made.

    >>> [backbone_word(backbone_pattern(word)) for word in ("adapter", "lora", "norm", "")]
    ['adapter', 'lora', 'norm', '']
    """
    return "lora" if pattern == "lora_*" else pattern.removeprefix("^backbone.").strip("*")


def _rules(value: Any, _: Any) -> Placed:
    """Language's rules: a plain word was any part of a name, any other pattern the whole name."""
    rules = [{**r, "pattern": _pattern(r["pattern"])} if _has(r, "pattern") else r for r in _list(value)]
    return [("optimizer.groups", rules)]


def _trainable(value: Any, _: Any) -> Placed:
    return [("trainable", value if value in ("full", "*") else [_pattern(pattern) for pattern in _list(value)])]


def _pattern(pattern: Any) -> Any:
    if not isinstance(pattern, str) or pattern in _SEGMENTS:
        return pattern
    return f"^{pattern}$" if set(pattern) & set("*?[") else f"*{pattern}*"


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _literal(word: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in word)


# field of version 1 -> what to write now; in this order, since `stop_epoch` moves what `epochs` has set
OLD: dict[str, Old] = {
    "training.batch": _renamed("training.batch_size"),
    "training.every": _renamed("training.unit"),
    "optimizer.clip_norm": Old("training.clip", _clip),
    "optimizer.backbone": Old("optimizer.groups", _backbone_rules),
    "schedule.warmup_epochs": _renamed("schedule.warmup"),
    "schedule.epochs": Old("training.epochs", _cosine_end),
    "schedule.stop_epoch": Old("training.epochs and schedule.ends_at", _run_end),
    "training.best": Old("-loss", _best),
}
# fields of version 1 that kept their name, and hold patterns that say it otherwise
_PATTERNS = {"optimizer.groups": _rules, "trainable": _trainable}
# values of version 1 that mean another thing now: what is to be written for what they meant, and why
_VALUES = {
    ("evaluation.protocol", "activitynet"): ("opentad", "repeated and empty segments were dropped, as OpenTAD does"),
}


def migrated(document: Any, where: str = "recipe") -> tuple[Any, list[str]]:
    """Read a recipe's document of any version as one of this version.

    Args:
        document: Plain values, as YAML or JSON gives them; what is no mapping comes back as it is.
        where: What errors name.

    Returns:
        A new document with `version`, and what was renamed in it, a sentence each.

    Raises:
        TensorkeepError: For a version that is not known here, and where a field is there under both names.

    >>> migrated({"training": {"batch": 4}})
    ({'version': 2, 'training': {'batch_size': 4}}, ['training.batch is training.batch_size now'])
    """
    if not isinstance(document, Mapping):
        return document, []
    version = document.get("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        hint = f"this one reads versions 1 to {VERSION}: update tensorkeep" if type(version) is int else None
        raise TensorkeepError(f"version {version!r} is not known", where=where, hint=hint)
    made = {"version": VERSION, **{k: copy.deepcopy(v) for k, v in document.items() if k != "version"}}
    if version == VERSION:
        return made, []
    said = []
    for name, places in _PATTERNS.items():
        value = at(made, name)
        if value is not None and (placed := places(value, made)) != [(name, value)]:
            _put_all(made, placed)
            said.append(f"{name}: a pattern covers whole parts of a name now, so it is {placed[0][1]}")
    for (name, was), (now, why) in _VALUES.items():
        if at(made, name) == was:
            _put_all(made, [(name, now)])
            said.append(f"{name}: {was} is {now} now ({why})")
    for name, old in OLD.items():
        if not _has(made, name):
            continue
        value = _take(made, name)
        placed = old.places(value, made)
        if at(made, old.now) is not None:
            raise TensorkeepError(f"says both {name} and {old.now}", where=where, hint=f"{old.now} alone")
        _put_all(made, placed)
        said += sentences(name, value, placed)
    return made, said


def sentences(name: str, value: Any, placed: Placed) -> list[str]:
    """Say what an old field is called now; nothing where name and value stayed."""
    if placed == [(name, value)]:
        return []
    if placed[0][0] == name:
        return [f"{name}: {value} is {placed[0][1]} now"]
    return [f"{name} is {OLD[name].now} now"]


def old_name(name: str) -> tuple[str, str] | None:
    """Split a dotted name into a field of version 1 and what follows it; None where it begins with none."""
    found = next((old for old in OLD if name == old or name.startswith(f"{old}.")), None)
    return None if found is None else (found, name[len(found) :])


def names_now(name: str) -> list[str]:
    """Give a field's name and, where it is one of version 1 or the end of one, what that is called now.

    >>> names_now("batch"), names_now("ema"), names_now("stop_epoch")
    (['batch', 'training.batch_size'], ['ema'], ['stop_epoch', 'training.epochs', 'schedule.ends_at'])
    """
    found = [OLD[old].now.split(" and ") for old in OLD if old.endswith(f".{name}") or old == name]
    return [name, *(now for places in found for now in places)]


def is_detection(document: Any) -> bool:
    """Whether a recipe's document is of a detection run: its data has two parts."""
    return isinstance(at(document, "data.train"), Mapping)


def at(document: Any, path: str) -> Any:
    """Return what stands at a dotted path through mappings; None where nothing does.

    Args:
        document: nested mappings.
        path: keys, joined by dots: "model.head".
    """
    for part in path.split("."):
        document = document.get(part) if isinstance(document, Mapping) else None
    return document


def _has(document: Any, path: str) -> bool:
    holder, _, key = path.rpartition(".")
    section = at(document, holder) if holder else document
    return isinstance(section, Mapping) and key in section


def _take(document: Any, path: str) -> Any:
    holder, _, key = path.rpartition(".")
    return (at(document, holder) if holder else document).pop(key)


def _put_all(document: dict[str, Any], placed: Placed) -> None:
    for path, value in placed:
        holder, _, key = path.rpartition(".")
        section = document if not holder else at(document, holder)
        if section is None:
            section = document[holder] = {}
        if isinstance(section, dict):
            section[key] = value
