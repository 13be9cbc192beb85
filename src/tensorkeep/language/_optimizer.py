"""Which parameters of a language model train, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import exactly, grouped, matches, near_pattern
from tensorkeep.language._reachable import unreached
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.training.optimizer import adamw, parameter_groups
from tensorkeep.training.randomness import derive
from tensorkeep.training.sections import OptimizerConfig

Remark = Callable[[str], None]


def choose_trainable(model: nn.Module, recipe: LanguageRecipe, remark: Remark = lambda _: None) -> None:
    """Freeze every parameter the recipe does not train, in place; with an adapter, put it on and quantize under it.

    Args:
        model: the whole model; with `quantize_backbone` its linears may be quantized already.
        recipe: `trainable`, `adapter`, `training.quantize_backbone` and `training.seed` (of the adapter's first
            weights) are used.
        remark: is told what stays in floats beside quantized weights, and which layers an adapter leaves out.

    Raises:
        TensorkeepError: a pattern of `trainable` fits no parameter, an adapter's target no linear, or (Q02) the
            quantized weights are not the same on every process.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in recipe.trainable:
        if not any(matches(name, [pattern]) for name in names):
            hint = near_pattern(pattern, names)
            raise TensorkeepError(f"{pattern!r} fits no parameter", where="trainable", hint=hint or f"e.g. {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(name, recipe.trainable))
    if recipe.adapter is None:
        return
    from tensorkeep.adapters.lora import ALL, adaptable, add_lora
    from tensorkeep.quantization.linear_layers import read_directly
    from tensorkeep.quantization.modules import check_ranks, quantize_, quantized_layers
    from tensorkeep.quantization.replacing import clean_name, left_wide
    from tensorkeep.quantization.wide import stayed_wide

    model.requires_grad_(False)
    if recipe.training.quantize_backbone and not quantized_layers(model):  # they may be quantized as they were loaded
        quantize_(model, recipe.training.quantize_backbone, exclude=left_wide(model))
    if recipe.training.quantize_backbone and (wide := stayed_wide(model)) is not None:
        remark(f"quantize_backbone: {wide}")
    adapter = recipe.adapter
    direct = {clean_name(n) for n in read_directly(model)}
    idle = [n for n in adaptable(model) if n in direct] if adapter.targets == (ALL,) else []
    if adapter.targets == (ALL,):
        idle += unreached(model, {n: m for n, m in adaptable(model).items() if n not in direct})
    if idle:
        what = "the model takes their weights without calling them, or no gradient reaches them"
        remark(f"adapter: {', '.join(grouped(idle)[:8])} left out of {ALL}: {what}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(recipe.training.seed, 1))
        add_lora(
            model,
            adapter.targets,
            adapter.lora_r,
            adapter.lora_alpha,
            adapter.lora_dropout,
            adapter.rslora,
            exclude=[exactly(n) for n in idle],
        )
    check_ranks(model)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters; norms and biases, which have one dimension, do not decay."""
    decays = {name: p.ndim > 1 for name, p in model.named_parameters() if p.requires_grad}
    return adamw(parameter_groups(model, config, decays, ("weights", "norms and biases")), config)
