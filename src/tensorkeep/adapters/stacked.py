"""LoRA on parameters that stack experts, as PEFT's `target_parameters`: every expert gets a pair of its own.

`lora_A` [experts · r, in] holds the experts one after the other, `lora_B` [out, r · experts] their columns in turn:
PEFT's order, so files need no rearranging. W of expert e grows by scale · B_e A_e.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches, near_pattern, unwrap
from tensorkeep.quantization.linear_layers import stacked_parameters
from tensorkeep.quantization.stacks import Stack, placed, stacks


def adapt_stacks(
    model: nn.Module,
    targets: Sequence[str],
    r: int,
    alpha: float,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """Give stacked parameters a low-rank update, in place; their base is frozen.

    A is drawn as PEFT draws it (Kaiming, uniform), B is zero.

    Args:
        model: its stacks may be floats or quantized.
        targets: patterns of the parameters' names.
        r: rank of each expert's update.
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) for rsLoRA.
        rslora: see `alpha`.
        rank_pattern: other ranks, by pattern.
        alpha_pattern: other alphas, by pattern.

    Returns:
        The names of the parameters.

    Raises:
        TensorkeepError: a pattern fits no parameter that stacks experts.
    """
    plain = {unwrap(f"{p}.{n}" if p else n)[0]: (m, n) for p, m, n in stacked_parameters(model)}
    known = [*plain, *(unwrap(n)[0] for n, _ in stacks(model))]
    for pattern in targets:
        if not any(matches(n, [pattern]) for n in known):
            what = f"{pattern!r} fits no parameter that stacks experts"
            ends = sorted({n.rpartition(".")[2] for n in known})
            hint = near_pattern(pattern, known) or (f"here: {', '.join(ends[:8])}" if ends else "this model has none")
            raise TensorkeepError(what, where="adapter.target_parameters", hint=hint)
    for name, (module, key) in plain.items():
        if matches(name, targets):
            placed(module, key)
    chosen = {unwrap(n)[0]: s for n, s in stacks(model) if matches(n, targets)}
    for name, stack in chosen.items():
        stack.r = next((v for p, v in (rank_pattern or {}).items() if matches(name, [p])), r)
        stack.alpha = float(next((v for p, v in (alpha_pattern or {}).items() if matches(name, [p])), alpha))
        stack.rslora = rslora
        if not isinstance(stack.r, int) or stack.r < 1:
            raise TensorkeepError(f"r={stack.r}: at least 1", where=name)
        stack.scale = stack.alpha / (math.sqrt(stack.r) if rslora else stack.r)
        (rows, columns), count = stack.sizes, stack.experts
        stack.lora_A = nn.Parameter(torch.empty(stack.r * count, columns, device=stack.device, dtype=torch.float32))
        stack.lora_B = nn.Parameter(torch.zeros(rows, stack.r * count, device=stack.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(stack.lora_A, a=math.sqrt(5))
    return list(chosen)


def adapted_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks with an update, by their parameters' names without wrappers.

    Args:
        model: with such stacks or without.
    """
    return {unwrap(n)[0]: s for n, s in stacks(model) if s.lora_A is not None}


def in_peft(names: Sequence[str]) -> dict[str, str]:
    """Return what PEFT calls the modules that it puts around parameters: the first of a module innermost.

    Args:
        names: of the adapted parameters, in the model's order.

    Returns:
        Parameter's name -> module's name in PEFT's files.

    Example:
        >>> in_peft(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: owner + ".base_layer" * (len(mine) - 1 - at)
        for owner, mine in owners.items()
        for at, name in enumerate(mine)
    }


def refuse_dropout(dropout: float, targets: Sequence[str]) -> None:
    """Stop where an update of parameters is to have dropout, which PEFT cannot load.

    Args:
        dropout: of the adapter.
        targets: patterns of parameters.

    Raises:
        TensorkeepError: both are given.
    """
    if dropout and targets:
        what = f"dropout {dropout:g} with target_parameters, for which PEFT has none"
        raise TensorkeepError(what, where="adapter.lora_dropout", hint="lora_dropout: 0")
