"""Walk what a file saved by torch holds: tensors under dotted names, plain values, and objects that stay opaque."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.storage.archive import Stored, stored_tensor
from tensorkeep.storage.dtensors import Part, part_of
from tensorkeep.storage.pickle_values import Object

# letters of all names together, and 16 more for each: a pickle of 1 kB can share its way to 2**60 leaves
_MOST_LETTERS = 16 << 20


class _Letters:
    """Count the letters of names, and stop where they are more than any state dict has."""

    def __init__(self, where: object) -> None:
        self.left, self.where = _MOST_LETTERS, where

    def take(self, letters: int) -> None:
        self.left -= letters
        if self.left < 0:
            raise TensorkeepError(
                "names more values than any state dict has", where=self.where, code="F07", hint="this is no state dict"
            )


def iter_tensors(value: Any, where: object, prefix: str = "") -> Iterator[tuple[str, Stored | Part | Any]]:
    """Walk a nested state dict and give every leaf with its dotted name.

    Args:
        value: what `saved_value` gave, or a part of it.
        where: the file, for messages.
        prefix: name of `value` itself; empty at the top.

    Yields:
        The dotted name and a `Stored` for each tensor, a `Part` for each DTensor, or the plain value for anything else.

    Raises:
        TensorkeepError: F07 where it is nested deeper, or names more values, than any state dict.
    """
    pending: list[tuple[str, Any, int]] = [(prefix, value, 0)]
    left = _Letters(where)
    seen: set[int] = set()
    while pending:
        name, item, depth = pending.pop()
        if depth > 32:
            raise TensorkeepError(
                "is nested more than 32 levels deep", where=where, code="F07", hint="this is no state dict"
            )
        if not isinstance(item, _NESTED):
            yield name, item
            continue
        tensor = (stored_tensor(item, where) or part_of(item, where)) if isinstance(item, Object) else None
        children = None if tensor is not None else _children(item)
        if children is None:
            yield name, item if tensor is None else tensor
            if tensor is None and isinstance(item, Object):
                yield from _within(item, where, name, seen, left)
            continue
        keys, values = children
        left.take((len(name) + 17) * len(keys) + sum(map(len, keys)))
        start, depth = f"{name}." if name else "", depth + 1
        pending.extend([(start + key, child, depth) for key, child in zip(reversed(keys), reversed(values))])


_NESTED = (Object, dict, list, tuple)


def _children(item: Any) -> tuple[list[str], Sequence[Any]] | None:
    """Give the named parts of a dict, or of a list that holds more than plain values; None for a leaf."""
    if isinstance(item, Object) and (item.is_mapping or item.entries):  # a dict, or a subclass of it
        item = item.entries or {}
    if isinstance(item, dict):
        return [_spelled(key) for key in item], list(item.values())
    if isinstance(item, (list, tuple)):
        for child in item:
            if isinstance(child, _NESTED):
                return list(map(str, range(len(item)))), item
    return None


_HELD_BY_MODULES = ("_parameters", "_buffers", "_modules")  # where torch's modules keep what their state dict lists


def _within(item: Object, where: object, name: str, seen: set[int], left: _Letters) -> Iterator[tuple[str, Stored]]:
    """Give the tensors inside somebody's own object, by attribute; each thing inside is looked at once."""
    pending: list[tuple[str, Any, int]] = [(name, item, 0)]
    while pending:
        path, value, depth = pending.pop()
        if id(value) in seen or depth > 32:
            continue
        if isinstance(value, (Object, dict, list, tuple)):
            seen.add(id(value))
        found = stored_tensor(value, where) if isinstance(value, Object) and depth else None
        if found is not None:
            yield path, found
            continue
        held = _attributes(value)
        left.take(sum(len(path) + len(key) + 17 for key, _ in held))
        for key, child in reversed(held):
            below = path if key in _HELD_BY_MODULES else f"{path}.{key}" if path else key
            pending.append((below, child, depth + 1))


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Give what a value holds that may hold tensors, by name or position."""
    if isinstance(value, dict):
        held: list[tuple[str, Any]] = [(_spelled(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        held = [(str(i), child) for i, child in enumerate(value)]
    elif isinstance(value, Object):
        states = value.state if isinstance(value.state, tuple) else (value.state,)  # (attributes, slots)
        held = [pair for state in states if isinstance(state, dict) for pair in _attributes(state)]
        held += _attributes(value.args) + _attributes(value.items or []) + _attributes(value.entries or {})
        unsaved = next((child for key, child in held if key == "_non_persistent_buffers_set"), None)
        if isinstance(unsaved, Object) and (left_out := [*unsaved.args, unsaved.items][0]):
            held = [(k, _without(v, left_out) if k == "_buffers" else v) for k, v in held]
    else:
        return []
    return [pair for pair in held if isinstance(pair[1], (Object, dict, list, tuple))]


def _without(held: Any, names: Any) -> Any:
    """Leave entries out of a dict or an `Object` of one."""
    entries = held.entries if isinstance(held, Object) else held
    return {k: v for k, v in entries.items() if k not in names} if isinstance(entries, dict) else held


def _spelled(key: Any) -> str:
    return key if isinstance(key, str) else shown(key)
