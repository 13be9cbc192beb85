"""Keep the input of one layer in a few; a backward makes those of the others again, by their forwards, in its turn.

Layers that keep nothing but their input keep one each. In stretches of n the first keeps its own, and the inputs of the
others are there only while the backward is in their stretch: L / n + n - 1 inputs at most, for nearly one more forward.
(Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, one level more.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], Any]


class Stretch:
    """Layers in a row, of which the first one's input is kept.

    Random numbers and autocast are those of the forward, so what is made again is what was there.

    Args:
        device: where the layers compute.
        keep: keeps a tensor for a while, and returns what `found` takes.
        found: gives it back.
    """

    def __init__(self, device: torch.device, keep: Callable[[Tensor], Any], found: Callable[[Any], Tensor]) -> None:
        self.first: Any = None  # the first layer's input, in whatever `found` takes
        self.steps: list[Step] = []
        self._end: tuple[Any, int] | None = None
        self._made: dict[int, Any] = {}
        self._keep, self._found, self._device = keep, found, device
        self._random = (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def goes_on_with(self, x: Tensor) -> bool:
        """Whether `x` is what the last step gave, unchanged since."""
        return self._end is not None and self._end[0]() is x and self._end[1] == x._version

    def add(self, step: Step, out: Any) -> None:
        """Note how the next layer's input is made of this one's."""
        self.steps.append(step)
        x = _state(out)
        self._end = (weakref.ref(x), x._version)

    def input(self, position: int) -> Tensor:
        """Return the input of the layer at a position, and make those before it on the way."""
        if position == 0:
            return self._found(self.first)
        if position not in self._made:
            x = self._found(self.first)
            with self._as_it_was():
                for place, step in enumerate(self.steps[:position], 1):
                    # with gradients, so that a compiled layer runs the very graph that it ran before
                    x = _state(step(x.detach().requires_grad_())).detach()
                    self._made[place] = self._keep(x) if place < position else x
        return self._found(self._made.pop(position))

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Random states and autocast as the first layer found them."""
        cpu, cuda = self._random
        enabled, dtype = self._autocast
        devices = [] if cuda is None else [self._device]
        with torch.random.fork_rng(devices), torch.autocast(self._device.type, dtype, enabled), torch.enable_grad():
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self._device)
            yield


class Place:
    """A layer in its stretch: what a graph holds in the place of the layer's input."""

    def __init__(self, stretch: Stretch, position: int, x: Tensor) -> None:
        self.stretch, self.position = stretch, position
        self._of = (x.data_ptr(), x.shape, x.dtype)

    def is_input(self, x: Tensor) -> bool:
        """Whether a saved tensor is the layer's input."""
        return self._of == (x.data_ptr(), x.shape, x.dtype)

    def back(self) -> Tensor:
        """Return the input."""
        return self.stretch.input(self.position)


def _state(out: Any) -> Tensor:
    """Return the hidden state that a layer gave, alone or as the first of several."""
    return out if isinstance(out, Tensor) else out[0]
