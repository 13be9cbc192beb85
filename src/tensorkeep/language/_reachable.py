"""Find the linears of a model that a loss does not reach: a low-rank update of one would stay zero without a word.

Mamba's kernels take a projection's weight without calling the layer, an indexer's scores end in a choice of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.conversion import architecture
from tensorkeep.models.refusals import refusals

_TOKENS = 8


def unreached(model: Any, linears: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers whose output moves no loss, in one forward and backward of a few tokens.

    Architectures in the table of `conversion.architecture` have no such layer and are not tried. One of a list of
    modules that was not called is not counted: no token was sent to that expert. A whole part that was not called is:
    the tower that sees, in a run over texts.

    Args:
        model: a causal language model, frozen or not; nothing is kept of the trial.
        linears: the layers to look at, by name.

    Returns:
        Their names; nothing where the model cannot be run here.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or kind in architecture.FAMILIES:
        return []
    around = {child: module for module in model.modules() for child in module.children()}
    called: set[nn.Module] = set()
    added: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_hook(lambda module, *_: called.add(module)) for m in around.values()]
    handles += [m.register_forward_hook(partial(_with_zero, added)) for m in linears.values()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            model.requires_grad_(False)
            ids = torch.arange(1, 1 + _TOKENS, device=next(model.parameters()).device)[None]
            loss = model(input_ids=ids, use_cache=False).logits.float().square().sum()
            grads = torch.autograd.grad(loss, list(added.values()), allow_unused=True)
    except refusals():
        return []
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    reached = {m for m, grad in zip(added, grads) if grad is not None and bool(grad.any())}
    return [n for n, m in linears.items() if m not in reached and (m in added or not _spare(m, around, called))]


def _spare(module: nn.Module, around: Mapping[nn.Module, nn.Module], called: Collection[nn.Module]) -> bool:
    """Whether a module that was not called is in one of a list that another token may call."""
    while module in around and around[module] not in called:
        module = around[module]
        if isinstance(around.get(module), nn.ModuleList | nn.ModuleDict):
            return around.get(around[module]) in called
    return False


def _with_zero(added: dict[nn.Module, Tensor], module: nn.Module, _inputs: Any, out: Any) -> Any:
    """Add a zero to a layer's output, whose gradient says whether the output matters."""
    if not isinstance(out, Tensor):
        return out
    zero = added.setdefault(module, torch.zeros(out.shape[-1], device=out.device, requires_grad=True))
    return out + zero.to(out.dtype)
