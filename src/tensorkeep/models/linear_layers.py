"""Find the modules of a live model that multiply by a matrix, whatever their class is called."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def linear_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield every module that is linear in effect.

    Args:
        model: a live model.

    Returns:
        Path, kind and module. Kinds: "linear" (`nn.Linear`), "subclass" (a class of its own that is one), "conv1d"
        (transformers' Conv1D, whose matrix is transposed), "experts" (parameters that stack one matrix an expert).
    """
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            yield path, "linear", module
        elif isinstance(module, nn.Linear):
            yield path, "subclass", module
        elif is_conv1d(module):
            yield path, "conv1d", module
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)) and "expert" in type(module).__name__.lower():
            yield path, "experts", module


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer whose weight is [in, out].

    Args:
        module: any module.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
