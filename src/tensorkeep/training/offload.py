"""Keep what a backward pass needs in page-locked main memory: out while the next part computes, in again before it.

A part's saved tensors leave the GPU on a stream of their own while the next part's forward runs, and come back while
the backward of the part after it runs, so at most two parts' tensors are on the GPU at a time. Copies are exact. On a
CPU nothing moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.training._again import Place, Stretch
from tensorkeep.training._pinned import pinned_memory

SMALLEST = 1 << 20  # bytes of a tensor that is worth moving
_ROUND = 1 << 20  # bytes: buffers of nearly the same size are used for each other


class HostStore:
    """Pinned main memory, and the CUDA stream that copies to and from it; reused from step to step.

    A copy or a pickle of it starts empty. Memory is mapped and registered here: torch's own pinned memory is
    rounded up to a power of two, which would double it.

    Args:
        most: bytes that it may pin (None: any number).
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.pinned = most, 0
        self.free: list[Tensor] = []  # bytes
        self.stream: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[type[HostStore], tuple[int | None]]:
        return HostStore, (self.most,)

    def fits(self, size: int) -> bool:
        """Whether `take` would find so many bytes, or may pin them."""
        more = -(-size // _ROUND) * _ROUND
        return self.most is None or self.pinned + more <= self.most or any(b.nbytes >= size for b in self.free)

    def take(self, size: int) -> Tensor:
        """Return at least `size` pinned bytes, with anything in them.

        Raises:
            TensorkeepError: No more memory can be pinned.
        """
        fitting = [index for index, buffer in enumerate(self.free) if buffer.nbytes >= size]
        if fitting:
            return self.free.pop(min(fitting, key=lambda index: self.free[index].nbytes))
        rounded = -(-size // _ROUND) * _ROUND
        try:
            memory, why = pinned_memory(rounded)
        except OSError as error:
            raise _no_memory(size, str(error)) from error
        if why:
            raise _no_memory(size, why)
        self.pinned += rounded
        return torch.frombuffer(memory, dtype=torch.uint8)

    def side(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream that the copies run on."""
        if self.stream is None or self.stream.device != device:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.stream

    def copy(self, to: Tensor, x: Tensor, device: torch.device) -> torch.cuda.Event:
        """Begin to copy `x` to `to` once what is queued is done; the event tells when it has arrived.

        Args:
            to: where it goes; the same shape and dtype.
            x: what is copied; it must live until the current stream has waited for the event.
            device: the GPU that one of the two is on.
        """
        side = self.side(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            to.copy_(x, non_blocking=True)
        event: torch.cuda.Event = side.record_event()
        return event


def _no_memory(size: int, why: str) -> TensorkeepError:
    """Make the error for memory that cannot be pinned."""
    what = f"{size / 2**20:.0f} MiB of main memory cannot be pinned for what a backward pass needs ({why})"
    hint = "for a detector checkpointing: two_level, else memory: most or null, keeps it on the GPU"
    return TensorkeepError(what, where="offload", hint=hint)


class _Here(NamedTuple):
    """One tensor that stays where it is; without its graph, since an output would keep itself alive by that."""

    x: Tensor
    version: int

    def back(self) -> Tensor:
        """Return it, unless it was changed in place: with hooks torch itself does not look."""
        if self.x._version != self.version:
            raise _changed(self.x.shape)
        return self.x


class _Away:
    """One tensor in main memory, given back to the store when nothing refers to it any more."""

    def __init__(self, store: HostStore, part: _Part, x: Tensor) -> None:
        self.store, self.part, self.device = store, part, x.device
        self.form = (x.dtype, x.shape, x.stride())
        self.buffer = store.take(x.nbytes)
        self.here: Tensor | None = _alone(x)  # on the GPU: on its way out, or back
        self.version, self.changed = x._version, False
        self.event = store.copy(self._host(), x, x.device)

    def _host(self) -> Tensor:
        dtype, shape, stride = self.form
        flat = self.buffer[: shape.numel() * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, stride)

    def leave(self) -> None:
        """Let the GPU's copy go once it has left; what was changed in place by then may have left so."""
        self._look()
        torch.cuda.current_stream(self.device).wait_event(self.event)
        self.here = None

    def fetch(self) -> None:
        """Begin to copy it back, unless it is on the GPU."""
        if self.here is None:
            dtype, shape, stride = self.form
            self.here = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
            self.event = self.store.copy(self.here, self._host(), self.device)
            self.version = self.here._version

    def _look(self) -> None:
        self.changed = self.changed or (self.here is not None and self.here._version != self.version)

    def back(self) -> Tensor:
        """Return the tensor on the GPU."""
        self.part.fetch()
        if self.part.before is not None:
            self.part.before.fetch()
        self.fetch()  # a second backward through the same graph
        assert self.here is not None
        self._look()
        if self.changed:
            raise _changed(self.form[1])
        torch.cuda.current_stream(self.device).wait_event(self.event)
        found, self.here = self.here, None
        return found

    def __del__(self) -> None:
        self.store.free.append(self.buffer)  # whoever takes it writes on the same stream, later


class _Part:
    """What one part of the network saved."""

    def __init__(self, before: _Part | None) -> None:
        self.before = before
        self.saved: weakref.WeakSet[_Away] = weakref.WeakSet()
        self.fetched = False

    def fetch(self) -> None:
        if not self.fetched:
            self.fetched = True
            for away in self.saved:
                away.fetch()

    def leave(self) -> None:
        for away in self.saved:
            away.leave()


class Offload:
    """Moves what parts of a network save for their backward to main memory; one for a model.

    Args:
        most: bytes of main memory that it may take (None: any number); what is saved beyond stays on the GPU. Parts
            come in the order of the forward, so that is what the backward needs first.
        every: of so many parts in a row that are placed (`place`) one keeps its input; those of the others are made
            again from it.

    Example:
        >>> offload, layer = Offload(), torch.nn.Linear(4, 4)
        >>> with offload.saving():  # on a CPU everything stays where it is
        ...     out = layer(torch.ones(2, 4))
        >>> out.sum().backward()
    """

    def __init__(self, most: int | None = None, every: int = 1) -> None:
        self.store, self.every = HostStore(most), every
        self._last: Any = lambda: None  # weak references to the part before,
        self._again: Any = lambda: None  # to what was last made again,
        self._stretch: Any = lambda: None  # and to the layers that share a kept input

    def __reduce__(self) -> tuple[type[Offload], tuple[int | None, int]]:
        return Offload, (self.store.most, self.every)

    def place(self, x: Tensor) -> Place | None:
        """Place a part behind those before it.

        Args:
            x: its input; it is to compute now.

        Returns:
            The place; None where every part keeps its own input.
        """
        if self.every == 1:
            return None
        stretch = self._stretch()
        if stretch is None or len(stretch.steps) >= self.every or not stretch.goes_on_with(x):
            stretch = Stretch(x.device, self._keep_again, _found)
            self._stretch = weakref.ref(stretch)
        return Place(stretch, len(stretch.steps), x)

    def _keep_again(self, x: Tensor) -> Any:
        """Let an input that was made again wait until the backward has come to its part."""
        before = self._again()
        part = _Part(before)
        self._again = weakref.ref(part)
        away = self._away(part, x)
        if before is not None:
            before.leave()
        return away

    def _away(self, part: _Part, x: Tensor) -> Any:
        """Send a tensor to main memory where it is of a kind that goes there and there is room."""
        if not (x.nbytes >= SMALLEST and x.is_cuda and x.is_floating_point() and _dense(x)):
            return _Here(_alone(x), x._version)
        if not self.store.fits(x.nbytes):
            return _Here(_alone(x), x._version)
        away = _Away(self.store, part, x)
        part.saved.add(away)
        return away

    @contextmanager
    def saving(
        self, staying: Collection[int] = (), largest: int | None = None, place: Place | None = None
    ) -> Iterator[None]:
        """Within it large tensors that are saved go to main memory; parts are entered in the order of the forward.

        Args:
            staying: addresses of tensors that stay: what several parts share, parameters and buffers.
            largest: tensors of more bytes stay (None: none of them).
            place: of this part, if its input may be made again.
        """
        before = self._last()
        part = _Part(before)
        self._last = weakref.ref(part)

        def pack(x: Tensor) -> Any:
            if place is not None and place.is_input(x):
                if place.position == 0 and place.stretch.first is None:
                    place.stretch.first = self._away(part, x)
                return place
            if x.data_ptr() in staying or (largest is not None and x.nbytes > largest):
                return _Here(_alone(x), x._version)
            return self._away(part, x)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, _found):
                yield
        finally:
            if place is not None:
                place.leave()
        if before is not None:
            before.leave()


def _found(kept: _Here | _Away | Place) -> Tensor:
    """Return a tensor that was kept, from wherever it is."""
    return kept.back()


def _alone(x: Tensor) -> Tensor:
    """Return a tensor without the graph that it came of; it is changed where the other is."""
    return x if x.grad_fn is None else x.detach()


def _changed(shape: torch.Size) -> TensorkeepError:
    """Make the error for a saved tensor that is not what it was."""
    what = f"a tensor of {tuple(shape)} that a backward pass needs was changed in place after it was saved"
    return TensorkeepError(what, where="offload", hint="change a copy of it: hidden = hidden * 2, not hidden *= 2")


def _dense(x: Tensor) -> bool:
    """Whether every element has a place of its own in one run of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(x.shape, x.stride()) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True
