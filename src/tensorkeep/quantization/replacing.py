"""Choose the linears of a model by pattern and put other modules in their places, tied names together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import exactly, matches, near_pattern, unwrap
from tensorkeep.quantization.encoding import EXCLUDED, HEADS
from tensorkeep.quantization.linear_layers import dense, is_conv1d, read_directly

if TYPE_CHECKING:
    from tensorkeep.quantization.linear import QuantLinear


def quantizable(module: nn.Module) -> bool:
    """Tell whether this is a plain dense linear, whatever its class is called, a Conv1D, or one with our LoRA on it.

    Args:
        module: any module.
    """
    return dense(module) or is_conv1d(module) or hasattr(module, "over")


def over(linear: nn.Module, made: QuantLinear) -> nn.Module:
    """Return the quantized form to put in the place of `linear`: its LoRA, where it has one, goes on top."""
    put: Any = getattr(linear, "over", None)
    return made if put is None else put(made)


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether one of the patterns fits a name and none of the others does.

    Args:
        name: of a module.
        include: patterns (see `formats.names.matches`).
        exclude: patterns.

    Returns:
        Whether it is chosen.
    """
    return matches(name, include) and not matches(name, exclude)


def left_wide(model: nn.Module) -> list[str]:
    """Return the patterns of the linears that must keep their floats: heads, embeddings, and weights that are taken.

    Args:
        model: a live model, on the meta device too.
    """
    return [*EXCLUDED, *heads(model), *(exactly(clean_name(n)) for n in read_directly(model))]


def heads(model: nn.Module) -> list[str]:
    """Return the patterns of the linears that are output heads: by their names, and the one that the model names.

    Args:
        model: a live model, on the meta device too.
    """
    own: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = own() if own is not None else None
    except (NotImplementedError, AttributeError):  # what a model class without a head says
        head = None
    return [*HEADS, *(exactly(clean_name(n)) for n, m in model.named_modules() if m is head)]


def check_patterns(names: Mapping[str, Any], patterns: Sequence[str], field: str) -> None:
    """Raise where a pattern fits no linear: a misspelt one would do less than was asked for.

    Args:
        names: the linears by name.
        patterns: patterns of names (see `formats.names.matches`).
        field: the option that they come from, for the error.

    Raises:
        TensorkeepError: a pattern fits nothing; the nearest names are in the hint.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            hint = near_pattern(pattern, names) or f"linears here: {', '.join(ends[:12])}"
            raise TensorkeepError(f"{pattern!r} fits no linear", where=field, hint=hint)


def tied_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one module, or one module twice, holds.

    Args:
        model: a live model, on the meta device too.
    """
    seen: set[int] = set()
    twice: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever they hang.

    Args:
        model: the model; the root itself cannot be replaced.
        made: old module -> new one, which is set to train or evaluate as the old one.

    Raises:
        TensorkeepError: the root is to be replaced.
    """
    if model in made:
        raise TensorkeepError("the model is itself the linear", where="model", hint="wrap it: nn.Sequential(linear)")
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[key] = made[child].train(child.training)


def clean_name(name: str) -> str:
    """Return a module's name without the segments of wrappers (DDP, FSDP, torch.compile, PEFT).

    Args:
        name: as `named_modules` gives it.
    """
    return unwrap(name)[0]
