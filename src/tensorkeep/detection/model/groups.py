"""Which parameters the optimizer gets, in which group, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tensorkeep.detection.model.layers import LevelScale, ScaledPath
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches
from tensorkeep.training import sections
from tensorkeep.training.optimizer import adamw, parameter_groups
from tensorkeep.training.sections import GroupRule


@dataclass(frozen=True)
class OptimizerConfig(sections.OptimizerConfig):
    """`optimizer` with AdaTAD's defaults: one rule for the adapters, `lr` and `weight_decay` for the detector."""

    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    groups: tuple[GroupRule, ...] = (GroupRule("adapter", 2e-4, 0.05),)


def detector_groups(model: nn.Module, config: sections.OptimizerConfig) -> list[dict[str, Any]]:
    """Sort a detector's parameters into groups: one for each rule, then detector weights (decayed), then its rest.

    In the detector, weights of convolutions and linears decay, and what a module names in `decayed` of its own
    parameters; biases, norms and scales do not. A model without a backbone leaves out the rules that fit none of its
    parameters.

    Args:
        model: A `Detector`.
        config: Rules, rates and decays.

    Returns:
        Groups as `parameter_groups` gives them.

    Raises:
        TensorkeepError: Where a rule gets nothing, and where a trainable backbone parameter fits no rule.
    """
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    if not any(name.startswith("backbone.") for name, _ in model.named_parameters()):
        own = tuple(rule for rule in config.groups if any(matches(name, [rule.pattern]) for name in trainable))
        config = replace(config, groups=own)
    decayed = _decayed(model)
    decays = {name: name in decayed for name in trainable}
    labels = ("detector weights", "detector biases, norms and scales")
    groups = parameter_groups(model, config, decays, labels)
    left = [name for g in groups if g["label"] in labels for name in g["names"] if name.startswith("backbone.")]
    if left:
        raise TensorkeepError(
            f"{len(left)} trainable backbone parameters are in no group, first {left[0]}",
            where="optimizer.groups",
            hint="add a rule with the pattern ^backbone for what is left, or freeze them",
        )
    return groups


def _decayed(model: nn.Module) -> set[str]:
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            names.add(f"{path}.weight")
        elif hasattr(module, "decayed"):
            names |= {f"{path}.{name}" for name in module.decayed}
        elif not isinstance(module, (nn.LayerNorm, nn.GroupNorm, LevelScale, ScaledPath)) and not path.startswith(
            "backbone"
        ):
            own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
            if own:  # a new kind of layer must decide for itself whether it decays
                raise TensorkeepError(
                    f"no decay rule for {path}.{own[0]} of a {type(module).__name__}", where="optimizer"
                )
    return names


def make_optimizer(model: nn.Module, config: sections.OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `detector_groups`; the fused kernel where the parameters are on a GPU."""
    return adamw(detector_groups(model, config), config)
