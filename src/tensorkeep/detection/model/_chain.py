"""Run a whole ViT as one operation of autograd, so that this module decides what lives on the GPU, and how long.

Floor, with u = the bytes of one stream `[N, L, C]` and d blocks, for a step that trains adapters over a frozen trunk:
20 bytes a trainable parameter (weight, gradient, two moments, average), the frozen weights (2 bytes each, 0.52 in
nf4, and one block's dense copy), the block inputs that are kept, and the working set of one block's backward: its
input, the gradient that flows, the adapter's output and three quarter-width tensors of it, one gradient (5 u), with
one piece of some chunks inside attention and MLP (`_recompute.SEGMENT_ELEMENTS`, about 32 bytes an element).
Which block inputs are kept depends on `checkpointing`:

* `segments`: d u, and no forward twice but what the backward reads;
* `two_level`: m u with m (m + 1) / 2 >= d - 1, so 9 u of 40: the inputs of the groups whose lengths fall from the
  front (9, 8, .. 1), since by the backward of an early group those of the later ones are gone, which is less than
  groups of equal length need (12 u); (d - m) / d of the forward is run twice;
* `offload`: none here, all in pinned main memory: d u out and in again over the bus, beside the computation.

For v2-g (768 x 160^2, one video) u = 125 MiB, so 4.9, 1.1 and 0 GiB are kept, beside a working set of 0.9 GiB, 0.5 GiB
of codes and 1.4 GiB for what trains: floors of 3.8 and 2.8 GiB for the last two. Measured on an H200 (2026-11-21,
torch 2.11): 3.89 GiB in 0.862 s and 3.15 GiB in 0.701 s; `segments`, which keeps attention outputs too, 10.42 GiB in
0.659 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tensorkeep.detection.model._recompute import Link, random_state, replay
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.offload import HostStore

Bound = tuple[Link, Sequence[Tensor]]  # a part of the network and those of its parameters that train
Again = Callable[[int, Tensor], Tensor]  # runs link i again from its input


def group_starts(count: int) -> list[int]:
    """Return the first link of each group of `two_level`: groups of 1, 2, 3, .. links from the back, the rest in front.

    Example:
        >>> group_starts(11)
        [0, 1, 5, 8, 10]
    """
    starts, length = [], 1
    while count > 0:
        count = max(0, count - length)
        starts.append(count)
        length += 1
    return starts[::-1]


class KeptInputs:
    """The inputs of a chain's links that are kept between forward and backward.

    Without a `host` they are those of each group's first link, on the GPU; with one they are all, in main memory.
    Without a GPU there is nothing to move: a `host` then means that all are kept where they are.
    """

    def __init__(self, host: HostStore | None) -> None:
        self.host = host
        self.everything = host is not None
        self.inputs: dict[int, Tensor] = {}
        self.buffers: dict[int, Tensor] = {}  # main memory
        self.starts: set[int] = set()
        self.moving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def begin(self, count: int, x: Tensor) -> None:
        """Get ready for the forward of `count` links, whose inputs all have the shape and dtype of `x`."""
        self.like = torch.empty_like(x, device="meta")
        self.device = x.device
        self.host = self.host if x.is_cuda else None
        self.starts = set(range(count) if self.everything else group_starts(count))

    def put(self, index: int, x: Tensor) -> None:
        """Keep the input of link `index` where the plan says so."""
        if self.host is None:
            if index in self.starts:
                self.inputs[index] = x
            return
        buffer = self.host.take(x.nbytes)
        event = self.host.copy(self._form(buffer), x, self.device)
        self.buffers[index] = buffer
        self.settle()  # the input before this one may go
        self.moving[index] = (x, event)

    def settle(self) -> None:
        """Let the current stream wait until all that is on its way to main memory has arrived."""
        for x, event in self.moving.values():
            torch.cuda.current_stream(x.device).wait_event(event)
        self.moving.clear()

    def get(self, index: int, again: Again) -> Tensor:
        """Hand over the input of link `index`, which is then no longer kept.

        Called in the backward, from the last link to the first. `again(i, x)` runs link i from its input.
        """
        if self.host is not None:
            self._fetch(index, self.host)
            x, event = self.moving.pop(index)
            torch.cuda.current_stream(self.device).wait_event(event)
            if index:
                self._fetch(index - 1, self.host)
            return x
        start = max((at for at in self.inputs if at <= index), default=None)
        if start is None:
            raise _gone()
        for at in range(start, index):
            self.inputs[at + 1] = again(at, self.inputs[at])
        return self.inputs.pop(index)

    def _fetch(self, index: int, host: HostStore) -> None:
        """Begin to copy the input of link `index` back to the GPU."""
        if index in self.moving:
            return
        if index not in self.buffers:
            raise _gone()
        buffer, x = self.buffers.pop(index), torch.empty_like(self.like, device=self.device)
        self.moving[index] = (x, host.copy(x, self._form(buffer), self.device))
        host.free.append(buffer)  # whoever takes it writes on the same stream, later

    def _form(self, buffer: Tensor) -> Tensor:
        """Return bytes as a tensor of the inputs' shape and dtype."""
        return buffer[: self.like.nbytes].view(self.like.dtype).view(self.like.shape)

    def __del__(self) -> None:
        # a forward whose backward never came
        if self.host is not None:
            self.host.free.extend(self.buffers.values())


def _gone() -> TensorkeepError:
    """Make the error for a second backward through the same graph."""
    hint = "run the forward again, or use checkpointing: segments with retain_graph"
    return TensorkeepError("a backward went through this graph already", where="vit.checkpointing", hint=hint)


def run_chain(links: Sequence[Bound], stream: list[Tensor], kept: KeptInputs, own: bool) -> Tensor:
    """Run the tensor in `stream`, `[N, L, C]`, through `links` in order.

    Links in front of all that trains run forward only.

    Args:
        links: the parts, each with those of its parameters that train.
        stream: a list of one tensor; it is emptied, so that the tensor can be freed.
        kept: decides which inputs are kept.
        own: whether the gradient that comes back belongs to nobody else and may be overwritten.
    """
    x = stream.pop()
    first = 0
    if not x.requires_grad:
        trains = [index for index, (_, parameters) in enumerate(links) if parameters]
        first = trains[0] if trains and torch.is_grad_enabled() else len(links)
    elif not torch.is_grad_enabled():
        first = len(links)
    with torch.no_grad():
        for link, _ in links[:first]:
            x = link.forward(x)[0]
    if first == len(links):
        return x
    box, lead = [x], x if x.requires_grad else None
    del x
    out: Tensor = _Chain.apply(links[first:], kept, own, box, lead, *chain(*(p for _, p in links[first:])))  # type: ignore[no-untyped-call]
    return out


class _Chain(torch.autograd.Function):
    """Links in a row as one operation: the forward keeps some inputs, the backward runs link by link from the end."""

    @staticmethod
    def forward(
        ctx: Any,
        links: Sequence[Bound],
        kept: KeptInputs,
        own: bool,
        box: list[Tensor],
        _lead: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        x = box.pop().detach()
        ctx.links, ctx.kept, ctx.own, ctx.random = links, kept, own, []
        ctx.save_for_backward(*parameters)
        kept.begin(len(links), x)
        for index, (link, _) in enumerate(links):
            kept.put(index, x)
            ctx.random.append(random_state(x) if link.random else None)
            x = link.forward(x)[0]
        kept.settle()
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        def again(index: int, x: Tensor) -> Tensor:
            with replay(x, ctx.random[index]):
                return ctx.links[index][0].forward(x)[0]  # type: ignore[no-any-return]

        parameters = list(ctx.saved_tensors)
        found: list[Tensor | None] = []
        grad: Any = grads[0].contiguous()
        own = ctx.own or grad is not grads[0]
        for index in range(len(ctx.links) - 1, -1, -1):
            link, trainable = ctx.links[index]
            at = len(parameters) - len(trainable)
            x = ctx.kept.get(index, again)
            with replay(x, ctx.random[index]):
                wanted = index > 0 or ctx.needs_input_grad[4]
                grad, more = link.backward(x, parameters[at:], None, grad, wanted, own)
            del parameters[at:], x
            found[:0], own = more, True
        return (None, None, None, None, grad, *found)
