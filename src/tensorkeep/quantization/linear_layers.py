"""Find the modules of a model that multiply by a matrix, whatever their class is called."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tensorkeep.errors import FOREIGN

# classes of linears that keep their weight in other ways, or that others read without calling them
_FOREIGN = ("torch.", "bitsandbytes.", "peft.", "torchao.", "accelerate.", "tensorkeep.", "transformer_engine.")


def linear_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield every module that is linear in effect.

    Args:
        model: a live model.

    Returns:
        Path, kind and module. Kinds: "linear" (`nn.Linear`, or a class of its own that computes the same), "conv1d"
        (transformers' Conv1D, whose matrix is transposed), "experts" (parameters that stack one matrix an expert).
    """
    for path, module in model.named_modules():
        if dense(module):
            yield path, "linear", module
        elif is_conv1d(module):
            yield path, "conv1d", module
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)) and "expert" in type(module).__name__.lower():
            yield path, "experts", module


def stacked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the parameters that stack a matrix an expert.

    Args:
        model: a live model, on the meta device too.

    Returns:
        Path of the module, the module, and the parameter's name in it.
    """
    for path, module in model.named_modules():
        if "expert" in type(module).__name__.lower():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield path, module, name


def dense(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear`, or a class derived from it that computes nothing else (Falcon's).

    Args:
        module: any module.

    Returns:
        Whether its forward is x W^T + b.
    """
    kind: Any = type(module)
    if kind is nn.Linear:
        return True
    return isinstance(module, nn.Linear) and not kind.__module__.startswith(_FOREIGN) and _computes_a_linear(kind)


@cache
def _computes_a_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class's forward is x W^T + b: tried on a copy without its own fields, with and without a bias."""
    for bias in (torch.tensor([1.0, -2.0, 0.5]), None):
        tried: Any = kind.__new__(kind)
        tried.__dict__.update(copy.copy(nn.Linear(5, 3, bias=bias is not None).__dict__))
        x, weight = torch.arange(10.0).view(2, 5) / 7 - 0.6, torch.arange(15.0).view(3, 5).cos()
        tried.weight = nn.Parameter(weight)
        if bias is not None:
            tried.bias = nn.Parameter(bias)
        try:
            with torch.no_grad():
                made = tried(x)
        except FOREIGN:  # it needs more than a linear's fields
            return False
        if not isinstance(made, torch.Tensor) or made.shape != (2, 3):
            return False
        if not torch.allclose(made.float(), F.linear(x, weight, bias), atol=1e-5):
            return False
    return True


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer whose weight is [in, out].

    Args:
        module: any module.

    Returns:
        Whether it is one.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return the sizes [out, in] of a linear layer, whichever way it keeps its matrix.

    Args:
        module: a linear, Conv1D, or one of ours.
    """
    layer: Any = module
    return (layer.nf, layer.nx) if is_conv1d(module) else (layer.out_features, layer.in_features)


def turned(module: nn.Module) -> bool:
    """Whether a layer keeps its matrix as [in, out], or is the quantized form of one that does.

    Args:
        module: a linear, Conv1D, or one of ours.

    Returns:
        Whether it does.
    """
    return is_conv1d(module) or bool(getattr(module, "inward", False))


def read_directly(model: nn.Module) -> list[str]:
    """Return the linear layers whose weight the module around them takes, beside calling the layer or instead of it.

    Mamba's kernels do so, Gemma 3n clamps one in place: such a weight must stay a plain matrix, and an update beside
    it is not seen. The source of the module's class says so.

    Args:
        model: a live model, on the meta device too.

    Returns:
        Their paths.
    """
    found = []
    for path, module in model.named_modules():
        children = [n for n, m in module.named_children() if dense(m) or is_conv1d(m)]
        taken = _weights_taken(type(module)) if children else frozenset[str]()  # type: ignore[arg-type]
        found += [f"{path}.{name}" if path else name for name in children if name in taken]
    return found


@cache
def _weights_taken(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of modules whose weight a class's own code takes, other than to ask for dtype or shape."""
    try:
        source = "\n".join(inspect.getsource(k) for k in kind.__mro__ if k.__module__.startswith("transformers.models"))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|requires_grad))", source))
