"""Recompute a ViT in links: keep one tensor per block, and never hold a whole block's activations.

The usual checkpoint of a block recomputes all of it at once, and those activations (a four times wider MLP, q, k, v)
are then the memory peak. Attention and MLP of a chunk of frames do not depend on other chunks, only the adapter
does. So a *link* is an adapter with the attention and MLP that *follow* it: its input is all that is kept, and in
the backward the adapter is recomputed once, the rest a few chunks at a time.

`Link` is what each link offers: the general one here, and the one of `_frozen`, whose backward is written by hand;
`_chain` runs many of them as one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Stage = Callable[[Tensor], Tensor]
Cut = Callable[[Tensor, slice], Tensor]  # some chunks `[n, L, C]`, and which ones they are
# elements of a stream `[n, L, C]` recomputed at a time in the last block, where memory peaks
SEGMENT_ELEMENTS = 8 * 2**20
SEGMENT_COPIES = 20  # as many times the recomputed part is alive then, generously


class Link(Protocol):
    """A part of a network that can be run again from its input."""

    @property
    def random(self) -> bool:
        """Whether it draws random numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the output `[N, L, C]` without gradients, and what `backward` may be given to save it work."""

    def backward(
        self, x: Tensor, parameters: Sequence[Tensor], held: Any, grad: Tensor, wants_x: bool, own: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of `x` and of `parameters`.

        Args:
            x: the input `[N, L, C]`.
            parameters: those of the link that train.
            held: what `forward` gave beside its output, or None.
            grad: the gradient of the output.
            wants_x: whether the gradient of `x` is wanted; else it is None.
            own: whether `grad` may be overwritten.
        """


def part_size(x: Tensor, left: int) -> int:
    """Return how many chunks of `x [N, L, C]` are recomputed at a time in a block with `left` blocks to the end.

    Large parts fill the GPU better. By the backward of an early block what the later ones kept is gone: one `x` each.
    """
    least = SEGMENT_ELEMENTS * len(x) // x.numel()
    return min(len(x), max(1, least + (left - 1) * len(x) // SEGMENT_COPIES))


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    """Return whether autocast is on, and its dtype."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@dataclass(frozen=True)
class AutogradLink:
    """The general link `parts(whole(x))`, whose backward is autograd's.

    Attributes:
        whole: sees all chunks.
        parts: treats every chunk by itself, some at a time.
        size: chunks that go through `parts` at a time.
        random: whether it draws random numbers.
        device: type of the device.
        autocast: whether autocast was on when this was made, and its dtype.
    """

    whole: Stage
    parts: Cut
    size: int
    random: bool
    device: str
    autocast: tuple[bool, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "autocast", _autocast_state(self.device))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the output for `x`, both `[N, L, C]`; nothing is kept for the backward."""
        with self._casting():
            middle = self.whole(x)
            pieces = [self.parts(middle[part], part) for part in slices(len(middle), self.size)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), None

    def backward(
        self, x: Tensor, parameters: Sequence[Tensor], held: None, grad: Tensor, wants_x: bool, own: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of `x` and `parameters`, as `Link.backward` says."""
        leaf = x.detach().requires_grad_(wants_x)
        sums: list[Tensor | None] = [None] * len(parameters)
        with torch.enable_grad():
            with self._casting():
                middle = self.whole(leaf)
            below = middle.requires_grad
            back = (grad if own and grad.dtype == middle.dtype else torch.empty_like(middle)) if below else None
            for part in slices(len(middle), self.size):
                piece = middle[part].detach().requires_grad_(below)
                with self._casting():
                    out = self.parts(piece, part)
                if out.requires_grad:
                    wanted = [*([piece] if below else []), *parameters]
                    found = list(torch.autograd.grad(out, wanted, grad[part], allow_unused=True))
                    if back is not None:
                        back[part] = found.pop(0)
                    _add(sums, found)
        lead: Tensor | None = None
        if back is not None:
            wanted = [*([leaf] if wants_x else []), *parameters]
            found = list(torch.autograd.grad(middle, wanted, back, allow_unused=True))
            lead = found.pop(0) if wants_x else None
            _add(sums, found)
            if lead is not None and back is grad:
                lead = grad.copy_(lead)  # whoever holds that memory holds it to the end: the other can go
        return lead, sums

    def _casting(self) -> torch.autocast:
        """Return the autocast that was on when this was made."""
        enabled, dtype = self.autocast
        return torch.autocast(self.device, dtype=dtype, enabled=enabled)


def slices(count: int, size: int) -> list[slice]:
    """Cut `range(count)` into pieces of `size`; the last may be shorter."""
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


def run_segment(link: Link, x: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Run `x [N, L, C]` through `link` and keep only `x` for the backward; `parameters`: those that may train."""
    trainable = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trainable):
        return link.forward(x)[0]
    out: Tensor = _Recomputed.apply(link, x, *trainable)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    """A link as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, link: Link, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.link = link
        ctx.random = random_state(x) if link.random else None
        ctx.save_for_backward(x, *parameters)
        return link.forward(x)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with replay(x, ctx.random):
            lead, found = ctx.link.backward(x, parameters, None, grads[0], ctx.needs_input_grad[1], False)
        return (None, lead, *found)


def _add(sums: list[Tensor | None], found: Iterable[Tensor | None]) -> None:
    """Add gradients to `sums`, in place; None stands for zero."""
    for index, grad in enumerate(found):
        if grad is not None:
            known = sums[index]
            sums[index] = grad if known is None else known + grad


RandomState = tuple[Tensor, Tensor | None]


def random_state(x: Tensor) -> RandomState:
    """Return the state of the generators that a computation on `x` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


@contextmanager
def replay(x: Tensor, state: RandomState | None) -> Iterator[None]:
    """Set the generators to `state` for the body of the `with`, and back afterwards; with None they are left alone."""
    with torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=state is not None):
        if state is not None:
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], x.device)
        yield


_ATTENTION_OPS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _attention_policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of attention, recompute everything else."""
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention() -> Any:
    """Make the contexts of torch's checkpoint that keeps attention outputs."""
    contexts: Any = create_selective_checkpoint_contexts
    return contexts(_attention_policy)
