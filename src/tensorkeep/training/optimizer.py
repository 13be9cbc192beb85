"""Which parameters the optimizer gets, in which group, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches, near_pattern
from tensorkeep.training.sections import GroupRule, OptimizerConfig


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, decays: Mapping[str, bool], labels: tuple[str, str]
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups: one for each rule, in order, then what is left with and without decay.

    Args:
        model: Its parameters with `requires_grad` are taken.
        config: Rules, rates and decays.
        decays: Name of every trainable parameter -> whether it decays where no rule takes it; what is left comes in
            this order.
        labels: What the two groups of the rest are called.

    Returns:
        Groups with `params`, `names`, `label`, `lr`, `base_lr` and `weight_decay`, none of them empty.

    Raises:
        TensorkeepError: Where a rule gets no parameter, with the rule that was first.
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
    rest = [name for name in decays if name not in taken]
    decayed = [name for name in rest if decays[name] or config.decay_all]
    plain = [name for name in rest if name not in set(decayed)]
    groups.append(_group(labels[0], decayed, trainable, config.lr, config.weight_decay))
    groups.append(_group(labels[1], plain, trainable, config.lr, 0.0))
    return [group for group in groups if group["params"]]


def _group(
    label: str, names: Iterable[str], parameters: Mapping[str, nn.Parameter], lr: float, decay: float
) -> dict[str, Any]:
    names = list(names)
    params = [parameters[name] for name in names]
    return {"params": params, "names": names, "label": label, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _empty(
    rule: GroupRule, fitting: list[str], taken: Mapping[str, str], trainable: Mapping[str, Any]
) -> TensorkeepError:
    what = f"the rule {rule.pattern!r} gets no parameter"
    if not fitting:
        some = f"there are {', '.join(list(trainable)[:3])} ..."
        hint = f"no trainable parameter has that name; {near_pattern(rule.pattern, trainable) or some}"
        return TensorkeepError(what, where="optimizer.groups", hint=hint)
    first = taken[fitting[0]]
    more = f"{fitting[0]} and {len(fitting) - 1} more went to the earlier rule {first!r}"
    return TensorkeepError(what, where="optimizer.groups", hint=f"{more}: put {rule.pattern!r} before it")


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over groups of parameters; the fused kernel where the parameters are on a GPU.

    Args:
        groups: parameter groups, as `torch.optim` takes them.
        config: the rest: rate, betas and eps.

    Returns:
        The optimizer.
    """
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)
