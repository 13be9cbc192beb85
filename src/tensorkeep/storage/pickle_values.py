"""What a pickle says, as plain data: names, calls that are never made, and references to storages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names; it is never looked up.

    Args:
        module: the module that is named.
        name: the class or function in it.

    >>> str(Global("torch", "Size"))
    'torch.Size'
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)  # a repr of what a hostile file nests and shares may never end
class Object:
    """What a pickle wanted to build; nothing of it is carried out.

    Attributes:
        call: the class or function that would have been called.
        args: its arguments.
        state: what the new object's attributes would have been set to.
        items: what would have been appended to it.
        entries: keys and values that would have been put into it.
    """

    call: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_mapping(self) -> bool:
        """Whether this would have been a dict."""
        return self.call.name in ("OrderedDict", "defaultdict", "dict")


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Persistent:
    """A persistent id: how torch refers to a storage outside the pickle."""

    value: Any
