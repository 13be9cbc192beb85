"""Gated MLPs of a transformers model run as one operation, where what they compute is that operation.

The layer becomes a subclass of itself, as in `_recompute`. Whether it computes down(act(gate(x)) · up(x)) is tried on
the layer before it is relied on; another keeps its own forward, and so does one whose weights train, are merged or
have dropout in their updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.adapters.lora import LoraLinear, LoraQuantLinear, LowRank
from tensorkeep.language import _gated_float8  # noqa: F401  registers its form
from tensorkeep.language._gated_mlp import ACTIVATIONS, ROLES, GatedMlp
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, compute_dtype, frozen_state, in_float8
from tensorkeep.quantization.linear import QuantLinear

NAMES = ("gate_proj", "up_proj", "down_proj")
_LINEARS = (nn.Linear, QuantLinear, LoraLinear, LoraQuantLinear)


class Fused(nn.Module):
    """The class that `fuse_mlps` puts over an MLP's own."""

    act: str
    keeps: bool

    def forward(self, x: Tensor) -> Any:
        """Compute the MLP, `[..., in] -> [..., in]`."""
        kind: Any = type(self).__bases__[1]
        parts: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        if not torch.is_grad_enabled() or not all(plain(part) for part in parts):
            return kind.forward(self, x)
        return run(x, parts, self.act, self.keeps)


def plain(part: Any) -> bool:
    """Whether a linear is frozen, without bias, and its update, if it has one, is that of its two factors alone."""
    if type(part) not in _LINEARS or part.bias is not None or part.weight.requires_grad:
        return False
    if not isinstance(part, LowRank):
        return True
    return part.merged is None and not (part.training and part.dropout)


def run(x: Tensor, parts: list[Any], act: str, keeps: bool) -> Tensor:
    """Compute down(act(gate(x)) · up(x)); in float8 where all three may be.

    Args:
        x: `[..., in]`.
        parts: gate, up and down, each `plain`.
        act: a name of `ACTIVATIONS`.
        keeps: whether gate and up are kept for the backward.

    Returns:
        `[..., out]`, in the dtype of computation.
    """
    kinds, numbers, scales, lora, states = [], [], [], [], []
    for part in parts:
        (kind, *sizes), state = frozen_state(part)
        low = isinstance(part, LowRank)
        kinds.append(kind)
        numbers += sizes
        scales.append(part.scale if low else 1.0)
        lora += [part.lora_A, part.lora_B] if low else [None, None]
        states += [*state, *([None] * (ROLES - len(state)))]
    how: Any = GatedMlp.apply
    dtype, first = compute_dtype(x), len(FOUR_BIT_ROLES)
    form = "float8" if in_float8(dtype) and all(states[i] is not None for i in range(first, len(states), ROLES)) else ""
    out: Tensor = how(x, form, dtype, ",".join(kinds), tuple(numbers), tuple(scales), act, keeps, *lora, *states)
    return out


@cache
def _fused_class(kind: Any) -> Any:
    return type(f"Fused{kind.__name__}", (Fused, kind), {})


def fuse_mlps(layers: Iterable[nn.Module], keep: Iterable[bool]) -> int:
    """Let the gated MLPs of decoder layers run as one operation each.

    Args:
        layers: changed in place; names and parameters stay.
        keep: for each layer, whether gate and up are kept for the backward, or else computed again.

    Returns:
        How many there are; the MLPs of the other layers are of another form and stay as they are.
    """
    count = 0
    for layer, keeps in zip(layers, keep):
        mlp: Any = getattr(layer, "mlp", None)
        if isinstance(mlp, Fused):
            mlp.keeps = keeps
            count += 1
            continue
        act = _activation(mlp)
        if act is not None:
            kind: Any = type(mlp)
            mlp.__class__ = _fused_class(kind)
            mlp.act, mlp.keeps = act, keeps
            count += 1
    return count


@torch.no_grad()
def _activation(mlp: Any) -> str | None:
    """Name the activation of a gated MLP; None where it is of another form."""
    if not isinstance(mlp, nn.Module) or not all(type(getattr(mlp, n, None)) in _LINEARS for n in NAMES):
        return None
    parts: list[Any] = [getattr(mlp, name) for name in NAMES]
    act_fn: Any = getattr(mlp, "act_fn", None)
    if not isinstance(act_fn, nn.Module) or any(part.bias is not None for part in parts):
        return None
    at = torch.linspace(-4, 4, 257, device=parts[0].weight.device)
    act = next((name for name, (f, _) in ACTIVATIONS.items() if torch.allclose(act_fn(at), f(at), atol=1e-6)), None)
    if act is None:
        return None
    dtype = next((part.weight.dtype for part in parts if part.weight.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, parts[0].in_features, generator=generator).to(parts[0].weight.device, dtype)
    training = mlp.training
    mlp.eval()  # no dropout
    theirs, mine = mlp(x).float(), parts[2](ACTIVATIONS[act][0](parts[0](x)) * parts[1](x)).float()
    mlp.train(training)
    return act if torch.allclose(theirs, mine, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())) else None
