"""Keep the input of one layer in a few; a backward makes those of the others again, by their forwards, in its turn.

Layers that keep nothing but their input keep one each. In stretches of n the first keeps its own, and the inputs of the
others are there only while the backward is in their stretch: L / n + n - 1 inputs at most, for nearly one more forward.
(Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, one level more.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[Tensor], Any]
_NONE: Mapping[str, Any] = MappingProxyType({})


class _Found(NamedTuple):
    """What a layer's forward found around it: states of random numbers, and autocast."""

    cpu: Tensor
    cuda: Tensor | None
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _Found:
        """Note it."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        return cls(torch.get_rng_state(), cuda, enabled, dtype)

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Be in it; random states are left changed."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        with torch.autocast(device.type, self.dtype, self.enabled):
            yield


class Stretch:
    """Layers in a row, of which the first one's input is kept.

    Random numbers and autocast are those of each layer's forward, so what is made again is what was there.

    Args:
        device: where the layers compute.
        keep: keeps a tensor for a while, and returns what `found` takes.
        found: gives it back.
    """

    def __init__(self, device: torch.device, keep: Callable[[Tensor], Any], found: Callable[[Any], Tensor]) -> None:
        self.first: Any = None  # the first layer's input, in whatever `found` takes
        self.steps: list[tuple[_Found, Step]] = []
        self._end: tuple[Any, int] | None = None
        self._made: dict[int, Any] = {}
        self.device, self._keep, self._found = device, keep, found

    def goes_on_with(self, x: Tensor) -> bool:
        """Whether `x` is what the last step gave, unchanged since, and the first layer's input is there."""
        return self.first is not None and self._end is not None and self._end[0]() is x and self._end[1] == x._version

    def add(self, found: _Found, step: Step, out: Any) -> None:
        """Note how the next layer's input is made of this one's."""
        self.steps.append((found, step))
        x = _state(out)
        self._end = (weakref.ref(x), x._version)

    def input(self, position: int) -> Tensor:
        """Return the input of the layer at a position, and make those before it on the way."""
        if position == 0:
            return self._found(self.first)
        if position not in self._made:
            x: Tensor = self._found(self.first)
            with torch.random.fork_rng([] if self.device.type == "cpu" else [self.device]), torch.enable_grad():
                for place, (found, step) in enumerate(self.steps[:position], 1):
                    # with gradients, so that a compiled layer runs the very graph that it ran before
                    with found.again(self.device):
                        x = _state(step(x.detach().requires_grad_())).detach()
                    if place < position:
                        self._made[place] = self._keep(x)
            return x
        return self._found(self._made.pop(position))


class Place:
    """A layer in its stretch: what a graph holds in the place of the layer's input."""

    def __init__(self, stretch: Stretch, position: int, x: Tensor) -> None:
        self.stretch, self.position = stretch, position
        self._x: Tensor | None = x  # until the layer has computed
        self._version, self._around = x._version, _Found.now(stretch.device)

    def is_input(self, x: Tensor) -> bool:
        """Whether a saved tensor is the layer's input, as it came."""
        own = self._x
        same = own is not None and (own.data_ptr(), own.shape, own.dtype) == (x.data_ptr(), x.shape, x.dtype)
        return same and own is not None and own.stride() == x.stride() and self._version == x._version

    def leave(self) -> None:
        """Let the input go: the layer has computed, or failed."""
        self._x = None

    def done(
        self, step: Callable[..., Any], out: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = _NONE
    ) -> None:
        """Note what the layer gave, and how that is made of its input.

        Args:
            step: the layer.
            out: what it gave: the next one's input, alone or as the first of several.
            args: what it took besides its input.
            kwargs: the same by name.
        """
        others, named = _alone(tuple(args)), _alone(dict(kwargs))
        self.stretch.add(self._around, lambda x: step(x, *others, **named), out)

    def back(self) -> Tensor:
        """Return the input."""
        return self.stretch.input(self.position)


def _alone(value: Any) -> Any:
    """Return arguments without the graph that tensors in them came of: kept in that graph, they would keep it."""
    if isinstance(value, Tensor):
        return value if value.grad_fn is None else value.detach().requires_grad_()
    if isinstance(value, dict):
        return {key: _alone(one) for key, one in value.items()}
    return type(value)(map(_alone, value)) if type(value) in (list, tuple) else value


def _state(out: Any) -> Tensor:
    """Return the hidden state that a layer gave, alone or as the first of several."""
    return out if isinstance(out, Tensor) else out[0]
