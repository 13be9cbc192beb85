"""Find a room's public names when they are first used, so that importing a room costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__`.

    Args:
        package: the package's `__name__`.
        where: public name -> module that defines it: relative to the package, or absolute where it begins with the
            package's top name.

    Returns:
        The two functions; the first raises AttributeError for a name that is not in `where`.

    Example:
        >>> find, names = lazy("tensorkeep.errors", {"near_misses": "tensorkeep.errors"})
        >>> names(), find("near_misses")("a", ["ab"])
        (['near_misses'], 'did you mean ab?')
    """
    top = package.partition(".")[0]

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = where[name] if where[name].startswith(f"{top}.") else f"{package}.{where[name]}"
        return getattr(importlib.import_module(place), name)

    return find, lambda: sorted(where)
