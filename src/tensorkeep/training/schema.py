"""Frozen dataclasses from plain mappings (a YAML section), strictly: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tensorkeep.errors import TensorkeepError, near_misses

T = TypeVar("T")
# it compiles every annotation: 7 of the 8.5 ms that a recipe took
hints_of: Callable[[type], dict[str, Any]] = functools.cache(get_type_hints)


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from plain values, nested dataclasses and tuples included.

    Args:
        kind: A frozen dataclass; its field types decide what fits. A tuple of texts may be one text alone. Where it has
            a class method `variant(values, where)`, that one's result is built instead.
        values: Field name -> plain value, as YAML and JSON have them.
        where: What errors name, in front of the key.

    Returns:
        The dataclass, with defaults for what `values` leaves out.

    Raises:
        TensorkeepError: Naming the path of an unknown or missing key, or of a value that does not fit.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     width: int = 1
    >>> from_mapping(Size, {"width": 3}, "size")
    Size(width=3)
    """
    if not isinstance(values, Mapping):
        raise TensorkeepError(f"expected a mapping, got {values!r}", where=where)
    if hasattr(kind, "variant"):
        kind = kind.variant(values, where)  # type: ignore[attr-defined]
    hints = hints_of(kind)
    for key in values:
        if key not in hints:
            hint = near_misses(str(key), hints) or f"known: {', '.join(hints)}"
            raise TensorkeepError(f"unknown key {key!r}", where=where, hint=hint)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, field in fields.items():
        unset = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if unset and name not in values:
            raise TensorkeepError(f"lacks the key {name!r}", where=where)
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        several = [a for a in kinds if get_origin(a) is tuple] if isinstance(value, list | tuple) else []
        return _convert((several or kinds)[0], value, where)
    if origin is Literal:
        if value in arguments:
            return value
        near = near_misses(str(value), map(str, arguments))
        hint = near or "give one of them, or leave it out for the default"
        raise TensorkeepError(f"{value!r} is not one of {', '.join(map(repr, arguments))}", where=where, hint=hint)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    return _convert_scalar(hint, value, where)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and arguments == (str, ...):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TensorkeepError(f"expected a list, got {value!r}", where=where)
    kinds = (arguments[0],) * len(value) if arguments[-1] is ... else arguments
    if len(kinds) != len(value):
        raise TensorkeepError(f"expected {len(kinds)} values, got {len(value)}", where=where)
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-8 (no dot) as text
            return float(value)
        except ValueError as error:
            raise TensorkeepError(f"expected a number, got {value!r}", where=where) from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise TensorkeepError(f"expected {hint.__name__}, got {value!r}", where=where)
    return value
