"""Where the tensors that a model's state dict names lie: found once in a run, and looked up at every save after that.

To make the state dict of a large model takes tenths of a second while the training waits, most of it for frozen modules
that no checkpoint keeps. So the dictionaries that hold the tensors are remembered, as long as the modules are the same
ones, with as many parameters each, of which the same ones train, and the same buffers, of which the same ones are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

Entry = tuple[str, Any]
Find = Callable[[], list[Entry]]


class _Place(NamedTuple):
    """Where a tensor lies: its name, the dictionary that holds it, and its key there."""

    name: str
    owner: dict[str, Any]
    key: str


class Names:
    """What was found of one model."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._beside: list[Entry] = []
        self._modules: list[nn.Module] = []  # held, so that no other takes the place of one
        self._shape: list[Any] | None = None
        self._held = False  # whether the newest list is that of the places
        self._detached: dict[str, tuple[Tensor, Tensor]] = {}  # whole, and this rank's part

    def entries(self, model: nn.Module, find: Find) -> list[Entry]:
        """List the entries of a model's state dict, with the very tensors that the modules hold.

        Args:
            model: always the same one.
            find: makes the list; called where what is remembered does not hold any more.
        """
        modules = list(_walk(model))
        shape = _shape(modules)
        self._held = shape == self._shape and all(key in owner for _, owner, key in self._places)
        if self._held:
            return [*((name, owner[key]) for name, owner, key in self._places), *self._beside]
        found = find()
        self._shape, self._detached = None, {}
        places = [_place(model, name, value) for name, value in found if isinstance(value, Tensor)]
        whole = [place for place in places if place is not None]
        if len(whole) == len(places):  # else a module stores other tensors than it holds
            self._places, self._modules, self._shape = whole, modules, shape
            self._beside = [entry for entry in found if not isinstance(entry[1], Tensor)]
        return found

    def parameters(self) -> dict[int, str]:
        """Name the tensors that `entries` listed last by their `id`; nothing where it had to make the list."""
        return {id(owner[key]): name for name, owner, key in reversed(self._places)} if self._held else {}

    def detached(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor without its gradient; of shards the same one again while they lie where they lay.

        Args:
            name: of the tensor.
            value: a parameter or buffer; of shards the part is asked for, which costs little where gradients are off.
        """
        to_local: Any = getattr(value, "to_local", None)
        if to_local is None:
            return value.detach()
        local, known = to_local(), self._detached.get(name)
        if known is None or not _same_memory(known[1], local):
            known = self._detached[name] = (value.detach(), local)
        return known[0]


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, a shared one as often as it is named."""
    left = [model]
    while left:
        module = left.pop()
        yield module
        left += [child for child in module._modules.values() if child is not None]


def _shape(modules: list[nn.Module]) -> list[Any]:
    """What must stay as it is: the modules, which buffers of each are kept, and which of its parameters train."""
    return [
        (
            id(m),
            [(n, b is None, n in m._non_persistent_buffers_set) for n, b in m._buffers.items()],
            [None if p is None else p.requires_grad for p in m._parameters.values()],
        )
        for m in modules
    ]


def _place(model: nn.Module, name: str, value: Tensor) -> _Place | None:
    """Find the dictionary that holds a tensor under its own name."""
    module: nn.Module | None = model
    *path, key = name.split(".")
    for part in path:
        module = None if module is None else module._modules.get(part)
    if module is not None:
        for owner in (module._parameters, module._buffers):
            if owner.get(key) is value:
                return _Place(name, owner, key)
    return None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
