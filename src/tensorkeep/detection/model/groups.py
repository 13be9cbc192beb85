"""Which parameters the optimizer gets, in which group, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorkeep.detection.model.layers import LevelScale, ScaledPath
from tensorkeep.errors import TensorkeepError


@dataclass(frozen=True)
class GroupRule:
    """Trainable backbone parameters whose name contains `name` (empty: all that are left) get this rate and decay."""

    name: str
    lr: float
    weight_decay: float = 0.05


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `lr` and `weight_decay` are the detector's (projection, neck, head); `backbone` rules are tried in order."""

    lr: float = 1e-4
    weight_decay: float = 0.05
    backbone: tuple[GroupRule, ...] = (GroupRule("adapter", 2e-4),)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: one for each backbone rule, then detector weights (decayed), then the rest of it.

    Each has `params`, `names`, `label`, `lr`, `base_lr`, `weight_decay`. The first rule that fits a name takes it.
    In the detector, weights of convolutions and linears decay; biases, norms and scales do not. Adapter biases and
    gamma do, as in OpenTAD. Raises TensorkeepError where a rule gets nothing, with the rule that was first, and
    where a trainable backbone parameter fits no rule.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    backbone = {name: p for name, p in trainable.items() if name.startswith("backbone.")}
    groups = []
    taken: dict[str, str] = {}
    for rule in config.backbone if any(name.startswith("backbone.") for name, _ in model.named_parameters()) else ():
        fits = [name for name in backbone if rule.name in name.removeprefix("backbone.")]
        names = [name for name in fits if name not in taken]
        if not names:
            raise _empty(rule, fits, taken)
        taken |= dict.fromkeys(names, rule.name)
        groups.append(_group(rule.name or "backbone", names, trainable, rule.lr, rule.weight_decay))
    left = [name for name in backbone if name not in taken]
    if left:
        raise TensorkeepError(
            f"{len(left)} trainable backbone parameters are in no group, first {left[0]}",
            where="optimizer.backbone",
            hint="add a rule with an empty name for what is left, or freeze them",
        )
    decayed = _decayed(model)
    rest = [name for name in trainable if name not in backbone]
    for label, names in (
        ("detector weights", [name for name in rest if name in decayed]),
        ("detector biases, norms and scales", [name for name in rest if name not in decayed]),
    ):
        decay = config.weight_decay if label == "detector weights" else 0.0
        groups.append(_group(label, sorted(names), trainable, config.lr, decay))
    return [group for group in groups if group["params"]]


def _group(
    label: str, names: list[str], parameters: dict[str, nn.Parameter], lr: float, decay: float
) -> dict[str, Any]:
    params = [parameters[name] for name in names]
    return {"params": params, "names": names, "label": label, "lr": lr, "base_lr": lr, "weight_decay": decay}


def _empty(rule: GroupRule, fits: list[str], taken: dict[str, str]) -> TensorkeepError:
    what = f"the rule {rule.name!r} gets no parameter"
    if not fits:
        return TensorkeepError(what, where="optimizer.backbone", hint="no trainable backbone parameter has that name")
    first = taken[fits[0]]
    hint = f"{fits[0]} and {len(fits) - 1} more went to the earlier rule {first!r}: put {rule.name!r} before it"
    return TensorkeepError(what, where="optimizer.backbone", hint=hint)


def _decayed(model: nn.Module) -> set[str]:
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            names.add(f"{path}.weight")
        elif not isinstance(module, (nn.LayerNorm, LevelScale, ScaledPath)) and not path.startswith("backbone"):
            own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
            if own:  # a new kind of layer must decide for itself whether it decays
                raise TensorkeepError(
                    f"no decay rule for {path}.{own[0]} of a {type(module).__name__}", where="optimizer"
                )
    return names


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the fused kernel where the parameters are on a GPU."""
    groups = parameter_groups(model, config)
    fused = all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)
