"""Gradient checkpointing of decoder layers: what of a forward is kept for the backward, compiled or not.

The layer becomes a subclass of itself, so names stay and nothing is patched. Kept, from least to most (bytes a token
of a Llama-3.1-8B layer in bf16): the `input` (8 kB), the products no wider than what they are made of (`narrow`,
34 kB), all `products` (92 kB), or `all` of it. With `input` torch's non-reentrant checkpoint goes around the layer;
between the two it goes inside one compiled graph, in which only what the backward needs is made again: a checkpoint
around the layer repeats its last product for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tensorkeep.quantization.linear  # noqa: F401  registers the operation that stands for its products
from tensorkeep.errors import TensorkeepError

Kept = Literal["input", "narrow", "products", "all"]

aten = torch.ops.aten
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
MATRIX = (aten.mm.default, aten.addmm.default, torch.ops.tensorkeep.products.default)


def _policy(most: float, _context: Any, operation: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep attention, and products whose output is at most `most` times as wide as their input."""
    if operation in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operation in MATRIX:
        left, right = args[1:3] if operation is aten.addmm.default else args[:2]
        if right.shape[1] <= most * left.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Lean(nn.Module):
    """The class `lean` puts over a layer's own: a forward that keeps only `kept`, and runs compiled if `compiled`."""

    kept: Kept
    compiled: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kinds: Any = type(self).__mro__  # FSDP2 may have put a class of its own over this one
        kind = kinds[kinds.index(Lean) + 1]
        wanted = self.kept if self.training and torch.is_grad_enabled() else "all"
        inside = wanted if wanted in ("narrow", "products") else "all"
        run = _compiled_forward(kind, inside) if self.compiled else kind.forward
        if wanted == "input":
            return checkpoint(run, self, *args, use_reentrant=False, **kwargs)
        return run(self, *args, **kwargs)


@cache
def _lean_class(kind: Any) -> Any:
    """Make the subclass of a layer's class; one for all its instances, or each would be compiled on its own."""
    return type(f"Lean{kind.__name__}", (Lean, kind), {})


@cache
def _compiled_forward(kind: Any, kept: Kept) -> Any:
    """Compile the forward of a class: its instances share one graph, whose inputs are their parameters."""
    if kept == "all":
        return torch.compile(kind.forward, dynamic=False)
    most = 1.0 if kept == "narrow" else float("inf")
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, most))

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(kind.forward, layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return torch.compile(forward, dynamic=False)


def lean(layers: Iterable[nn.Module], kept: Kept = "input", compiled: bool = False) -> int:
    """Make these layers keep no more than `kept` for the backward and, with `compiled`, run compiled.

    Called again it changes both. Uncompiled, outputs and gradients are bitwise those of the plain layer; torch replays
    dropout from the saved random state.

    Args:
        layers: changed in place; their names and parameters stay.
        kept: what is kept, from least to most: see the head of this module.
        compiled: run the layers through torch.compile.

    Returns:
        How many layers there are.

    Raises:
        TensorkeepError: `narrow` or `products` without `compiled`.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> lean([block]), type(block).__name__, [name for name, _ in block.named_parameters()]
        (1, 'LeanSequential', ['0.weight', '0.bias'])
    """
    if kept in ("narrow", "products") and not compiled:
        raise TensorkeepError(
            f"keeping {kept!r} needs a compiled layer", where="recompute", hint="compile: true, or keep the input"
        )
    count = 0
    for layer in layers:
        if not isinstance(layer, Lean):
            kind: Any = type(layer)
            layer.__class__ = _lean_class(kind)
        layer.kept, layer.compiled = kept, compiled  # type: ignore[assignment]
        count += 1
    return count
