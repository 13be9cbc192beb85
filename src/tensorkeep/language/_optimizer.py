"""Which parameters of a language model train, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import exactly, grouped, matches, near_pattern
from tensorkeep.language._reachable import unreached
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.quantization.spreading import holds_codes
from tensorkeep.training.optimizer import adamw, parameter_groups
from tensorkeep.training.randomness import derive
from tensorkeep.training.sections import OptimizerConfig

Remark = Callable[[str], None]


def choose_trainable(
    model: nn.Module, recipe: LanguageRecipe, peers: bool = False, remark: Remark = lambda _: None
) -> None:
    """Freeze every parameter the recipe does not train, in place; with an adapter, put it on and quantize under it.

    Args:
        model: the whole model; with `quantize_backbone` its linears may be quantized already.
        recipe: `trainable`, `adapter`, `training.quantize_backbone` and `training.seed` (of the adapter's first
            weights) are used.
        peers: other processes build the same model, and quantized weights are compared with theirs.
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
    unseen = beside_text(model)
    for name, parameter in model.named_parameters():
        trains = matches(name, recipe.trainable) and not name.startswith(unseen)
        parameter.requires_grad_(trains and not holds_codes(parameter))  # codes that are spread are parameters too
    if recipe.adapter is None:
        return
    from tensorkeep.adapters.lora import ALL, adaptable, add_lora, draw, layers
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
        settings = (adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout, adapter.rslora)
        aside = [n for n in adaptable(model) if n.startswith(unseen)]
        without = [exactly(n) for n in dict.fromkeys([*idle, *aside])]
        add_lora(model, adapter.targets, *settings, exclude=without, parameters=adapter.target_parameters)
        for layer in layers(model).values():
            if layer.lora_A.is_meta:  # the model has no values yet: updates are drawn as they would be on it
                draw(layer, torch.device("cpu"))
    if adapter.quantize_aware is not None:
        from tensorkeep.adapters.aware import make_aware

        make_aware(model, adapter.quantize_aware)
    check_ranks(model, peers)


def beside_text(model: Any) -> tuple[str, ...]:
    """Return the beginnings of the names that a text does not pass through in a model that sees too: its towers.

    Args:
        model: of transformers; for a model of text alone, or another library's, there are none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "get_decoder") or not hasattr(config, "get_text_config"):
        return ()
    if config.get_text_config() is config:
        return ()
    inside = [m for m in (model.get_decoder(), model.get_output_embeddings()) if m is not None]
    names = [n for n, m in model.named_modules() if any(m is one for one in inside)]
    out: list[str] = []
    for name, _ in model.named_modules():
        above = any(n == name or n.startswith(f"{name}.") for n in names) or not name
        below = any(name.startswith(f"{n}.") for n in names)
        if not above and not below and not name.startswith(tuple(out)):
            out.append(f"{name}.")
    return tuple(out)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters; norms and biases, which have one dimension, do not decay."""
    decays = {name: p.ndim > 1 for name, p in model.named_parameters() if p.requires_grad}
    return adamw(parameter_groups(model, config, decays, ("weights", "norms and biases")), config)
