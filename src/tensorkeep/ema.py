"""Exponential moving average of a model's trainable weights, by name, in float32.

Frozen, integer and quantised state is never averaged and never travels: evaluation under the average swaps exactly
the trainable tensors, by pointer, and puts the very same tensors back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TensorkeepError


class Ema:
    """Average of the parameters that train when it is made.

    `decay` per update; `warmup=True` starts lower, `min(decay, (1 + n) / (10 + n))` at update n (0-based), so that
    a short run is not dominated by its start. `device="cpu"` keeps the average off the GPU.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(0.0)
    >>> ema = Ema(model, decay=0.9)
    >>> _ = model.weight.data.fill_(1.0)
    >>> ema.update(model)
    >>> with ema.applied(model):
    ...     print(round(model.weight.item(), 3))
    0.1
    >>> model.weight.item()
    1.0
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, warmup: bool = False, device: torch.device | str | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise TensorkeepError(f"decay must be in [0, 1), got {decay}", where="ema")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.tensors: dict[str, Tensor] = {
            name: p.detach().to(device=device, dtype=torch.float32, copy=True)
            for name, p in _unwrap(model).named_parameters()
            if p.requires_grad and p.is_floating_point()
        }
        self._applied = False

    def decay_at(self, update: int) -> float:
        """Decay used by update `update` (0-based)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """`e <- d e + (1 - d) m` for every tensor; call it after the optimizer's step."""
        if self._applied:
            raise TensorkeepError("cannot be updated while it is applied: the model holds the average", where="ema")
        averages, values = list(self.tensors.values()), []
        for name, parameter in self._parameters(model).items():
            average = self.tensors[name]
            values.append(parameter.detach().to(device=average.device, dtype=torch.float32))
        if averages:
            torch._foreach_lerp_(averages, values, 1.0 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it the model's trainable weights are the average; afterwards, also after an error, they are
        bitwise what they were."""
        if self._applied:
            raise TensorkeepError("is applied already", where="ema")
        parameters = self._parameters(model)
        kept: dict[str, Tensor] = {}
        self._applied = True
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    kept[name] = _put(parameter, self.tensors[name])
            yield
        finally:
            with torch.no_grad():
                for name, original in kept.items():
                    _put_back(parameters[name], original)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, float32, without copies; `updates` is the only other state."""
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over saved averages; names and shapes must be exactly ours.

        Raises TensorkeepError that lists missing and unexpected names and shapes that differ.
        """
        missing, extra = sorted(self.tensors.keys() - state.keys()), sorted(state.keys() - self.tensors.keys())
        shapes = [
            f"{name} {tuple(state[name].shape)} instead of {tuple(mine.shape)}"
            for name, mine in self.tensors.items()
            if name in state and state[name].shape != mine.shape
        ]
        problems = [("missing", missing), ("unexpected", extra), ("shape differs", shapes)]
        if any(names for _, names in problems):
            what = "; ".join(f"{label}: {', '.join(names[:5])} ({len(names)})" for label, names in problems if names)
            hint = "the average must be of the same trainable tensors; was another part frozen?"
            raise TensorkeepError(what, where="ema", hint=hint)
        for name, mine in self.tensors.items():
            mine.copy_(state[name])
        self.updates = updates

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = dict(_unwrap(model).named_parameters())
        missing = [name for name in self.tensors if name not in found]
        if missing:
            what = f"the model has no parameter {missing[0]} ({len(missing)} of {len(self.tensors)} are gone)"
            raise TensorkeepError(what, where="ema", hint="make the average after the model has its final form")
        return {name: found[name] for name in self.tensors}


def _unwrap(model: nn.Module) -> nn.Module:
    """The module under DDP and torch.compile: names must not depend on how it is run."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _put(parameter: nn.Parameter, average: Tensor) -> Tensor:
    """Make `parameter` hold `average`; returns what restores it."""
    if hasattr(parameter, "to_local"):
        # a sharded parameter's storage is known elsewhere (FSDP2 gathers from it): keep the pointer, move the values
        original = parameter.detach().clone()
        parameter.copy_(average)
        return original
    original = parameter.data
    parameter.data = average.to(device=original.device, dtype=original.dtype)
    return original


def _put_back(parameter: nn.Parameter, original: Tensor) -> None:
    if hasattr(parameter, "to_local"):
        parameter.copy_(original)
    else:
        parameter.data = original
