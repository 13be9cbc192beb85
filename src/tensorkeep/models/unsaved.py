"""Tensors that transformers leaves out of files because a model computes them itself, such as Marian's positions.

Its loader takes them from a file that holds them all the same. They are therefore left out of a comparison only where
they hold what the model computes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

_SPELLED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def computed_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model computes for each parameter that transformers leaves out of its files.

    Args:
        model: a transformers model, wrapped or not, on any device; it stays as it is.

    Returns:
        Values in float32 by the parameter's name; nothing for one that is drawn, which a file without it does lack.
    """
    out = {}
    for path, owner in model.named_modules():
        for key in sorted(str(k) for k in getattr(owner, "_keys_to_ignore_on_save", None) or ()):
            place, _, leaf = key.rpartition(".")
            module = dict(owner.named_modules()).get(place)
            if module is None or module._parameters.get(leaf) is None or not hasattr(owner, "_init_weights"):
                continue
            first, second = (_initialised(owner, module, leaf, seed) for seed in (0, 1))
            if torch.equal(first, second):  # NaN, where nothing is computed, equals nothing
                out[f"{path}.{key}" if path else key] = first
    return out


def _initialised(owner: Any, module: nn.Module, leaf: str, seed: int) -> Tensor:
    """Return a parameter as its model initialises it, in a copy of its module."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = {
        n: None if p is None else nn.Parameter(torch.full(p.shape, torch.nan), requires_grad=False)
        for n, p in module._parameters.items()
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        owner._init_weights(shell)
    found = shell._parameters[leaf]
    assert found is not None
    return found.detach()


def digests(values: Tensor) -> dict[str, str]:
    """Return the xxh3_128 of a tensor's bytes in every dtype that files hold it in.

    Args:
        values: in float32.
    """
    spelled = {name: values.to(dtype).contiguous() for name, dtype in _SPELLED.items()}
    return {n: xxhash.xxh3_128(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in spelled.items()}
