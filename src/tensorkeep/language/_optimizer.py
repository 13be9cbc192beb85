"""Which parameters of a language model train, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches, near_pattern
from tensorkeep.language.recipe import GroupRule, LanguageRecipe, OptimizerConfig
from tensorkeep.training.randomness import derive


def choose_trainable(model: nn.Module, recipe: LanguageRecipe) -> None:
    """Freeze every parameter the recipe does not train, in place; with an adapter, put it on and quantize under it.

    Args:
        model: the whole model; with `quantize_backbone` its linears may be quantized already.
        recipe: `trainable`, `adapter`, `training.quantize_backbone` and `training.seed` (of the adapter's first
            weights) are used.

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
    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.quantization.modules import check_ranks, quantize_, quantized_layers

    model.requires_grad_(False)
    if recipe.training.quantize_backbone and not quantized_layers(model):  # they may be quantized as they were loaded
        quantize_(model, recipe.training.quantize_backbone)
    adapter = recipe.adapter
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(recipe.training.seed, 1))
        add_lora(model, adapter.targets, adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout, adapter.rslora)
    check_ranks(model)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for the optimizer: one a rule, then the rest with and without decay.

    The first rule that fits a name takes it. Of the rest, parameters of one dimension (norms, biases) get no decay
    unless `config.decay_all`.

    Args:
        model: its parameters that require gradients are sorted.
        config: the rules, and rate and decay of the rest.

    Returns:
        Groups in the order of the rules, none of them empty. Each has `params`, `label` (the rule's pattern),
        `lr`, `base_lr` (what schedules start from) and `weight_decay`.

    Raises:
        TensorkeepError: a rule gets no parameter; says which earlier rule took them.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken: dict[str, str] = {}
    groups = []
    for rule in config.groups:
        fitting = [name for name in trainable if matches(name, [rule.pattern])]
        own = [name for name in fitting if name not in taken]
        if not own:
            raise _empty(rule, fitting, taken, trainable)
        taken |= dict.fromkeys(own, rule.pattern)
        decay = config.weight_decay if rule.weight_decay is None else rule.weight_decay
        groups.append(_group(rule.pattern, own, trainable, rule.lr, decay))
    rest = [name for name in trainable if name not in taken]
    decayed = [name for name in rest if trainable[name].ndim > 1 or config.decay_all]
    undecayed = [name for name in rest if name not in set(decayed)]
    groups.append(_group("weights", decayed, trainable, config.lr, config.weight_decay))
    groups.append(_group("norms and biases", undecayed, trainable, config.lr, 0.0))
    return [group for group in groups if group["params"]]


def _group(
    label: str, names: Iterable[str], parameters: Mapping[str, nn.Parameter], lr: float, decay: float
) -> dict[str, Any]:
    """One group as torch's optimizers take it, with a label and the rate that schedules start from."""
    params = [parameters[name] for name in names]
    return {"params": params, "label": label, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _empty(
    rule: GroupRule, fitting: list[str], taken: Mapping[str, str], trainable: Mapping[str, Any]
) -> TensorkeepError:
    """The error for a rule that gets no parameter: no name fits it, or earlier rules took them all."""
    what = f"the rule {rule.pattern!r} gets no parameter"
    if not fitting:
        some = f"there are {', '.join(list(trainable)[:3])} ..."
        hint = f"no trainable parameter has that name; {near_pattern(rule.pattern, trainable) or some}"
        return TensorkeepError(what, where="optimizer.groups", hint=hint)
    first, more = taken[fitting[0]], len(fitting) - 1
    hint = f"{fitting[0]} and {more} more went to the earlier rule {first!r}: put {rule.pattern!r} before it"
    return TensorkeepError(what, where="optimizer.groups", hint=hint)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over `parameter_groups`; its fused kernel where all parameters are on a GPU."""
    groups = parameter_groups(model, config)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)
