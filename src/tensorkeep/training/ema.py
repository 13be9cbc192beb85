"""Exponential moving average of a model's trainable weights, by name, in float32.

Frozen, integer and quantized tensors are never averaged and never moved: evaluation under the average swaps exactly
the trainable tensors, by pointer, and puts the very same tensors back. An update reads the weights, reads and writes
the average, and does nothing else: 12 bytes a trainable parameter, whatever the size of the frozen base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TensorkeepError


class _Pending(NamedTuple):
    """An update of an average in main memory whose weights are still on their way from the GPU."""

    arrived: torch.cuda.Event
    averages: list[Tensor]
    values: list[Tensor]
    weight: float


class Ema:
    """An exponential moving average of the parameters that train when it is made.

    Args:
        model: its trainable parameters are the first average.
        decay: share of the old average that stays at each update, in [0, 1).
        warmup: begin with a lower decay, `min(decay, (1 + n) / (10 + n))` at update n (from 0), so that a short run is
            not dominated by its start.
        device: `cpu` keeps the average off the GPU: weights are copied to pinned memory without waiting, and averaged
            there at the next update or when the average is asked for. None: the parameters' own device.

    Attributes:
        updates: how many updates went in.

    Raises:
        TensorkeepError: nothing trains, packed codes train (Q03), or `decay` is out of range.

    Example:
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
        self._tensors: dict[str, Tensor] = {
            name: _start(parameter, device) for name, parameter in trainable(model).items()
        }
        if not self._tensors:
            hint = "make the average after what trains has been chosen"
            raise TensorkeepError("no parameter of the model trains", where="ema", hint=hint)
        self._paths = {name: name.split(".") for name in self._tensors}
        self._staged: dict[str, Tensor] = {}
        self._pending: _Pending | None = None
        self._applied = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by name, float32, with every update in them; not copies."""
        self._settle()
        return self._tensors

    def decay_at(self, update: int) -> float:
        """Compute the decay of update `update`, from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the model's weights in, `e <- d e + (1 - d) w`; call it after the optimizer's step.

        Raises:
            TensorkeepError: the average is applied, or a parameter is gone.
        """
        if self._applied:
            raise TensorkeepError("cannot be updated while it is applied: the model holds the average", where="ema")
        parameters = self._parameters(model)
        self._settle()
        averages, values, stream = [], [], None
        for name, parameter in parameters.items():
            average, value = _local(self._tensors[name]), _local(parameter)
            if value.is_cuda and not average.is_cuda:
                value, stream = self._copied(name, value), torch.cuda.current_stream(value.device)
            averages.append(average)
            values.append(value if value.device == average.device else value.to(device=average.device))
        weight = 1.0 - self.decay_at(self.updates)
        if stream is None:
            _lerp(averages, values, weight)
        else:
            self._pending = _Pending(stream.record_event(), averages, values, weight)
        self.updates += 1

    def _copied(self, name: str, value: Tensor) -> Tensor:
        """Copy weights into pinned memory, in the order of the current stream: the next optimizer step comes after."""
        if name not in self._staged:
            self._staged[name] = torch.empty_like(value, device="cpu", pin_memory=True)
        return self._staged[name].copy_(value, non_blocking=True)

    @torch.no_grad()
    def _settle(self) -> None:
        """Carry out the update whose weights were on their way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.arrived.synchronize()
            _lerp(pending.averages, pending.values, pending.weight)

    @contextmanager
    def applied(self, model: nn.Module, copy: bool = False) -> Iterator[None]:
        """Within it the model's trainable weights are the average; afterwards they are bitwise what they were.

        Args:
            model: the model the average was made of.
            copy: keep the parameters' addresses and move the values, which recorded CUDA graphs need
                (`torch.compile(mode="reduce-overhead")`); else parameters point to the average. Shards of FSDP2 are
                always moved.

        Raises:
            TensorkeepError: the average is applied already, or a parameter is gone.
        """
        if self._applied:
            raise TensorkeepError("is applied already", where="ema")
        parameters, averages = self._parameters(model), self.tensors
        kept: list[tuple[nn.Parameter, Tensor]] = []
        self._applied = True
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    # noted before it is changed: an interruption in between must not lose it
                    kept.append((parameter, _original(parameter, copy)))
                    _put(parameter, averages[name], copy)
            yield
        finally:
            with torch.no_grad():
                for parameter, original in kept:
                    _put_back(parameter, original, copy)
            self._applied = False

    def state_dict(self) -> dict[str, Tensor]:
        """Give the averages by name, float32, without copies; `updates` is the only other state."""
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over saved averages; names and shapes must be exactly those here.

        Args:
            state: averages by name.
            updates: how many updates went into them.

        Raises:
            TensorkeepError: lists missing and unexpected names, shapes that differ, and whole tensors where those here
                are sharded; then nothing was changed.
        """
        own = self.tensors
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        both = {name: (mine, state[name]) for name, mine in own.items() if name in state}
        other = {n: (mine.shape, theirs.shape) for n, (mine, theirs) in both.items() if theirs.shape != mine.shape}
        shapes = [f"{n} {tuple(theirs)} instead of {tuple(mine)}" for n, (mine, theirs) in other.items()]
        whole = [n for n, (mine, theirs) in both.items() if hasattr(mine, "to_local") != hasattr(theirs, "to_local")]
        problems = {"missing": missing, "unexpected": extra, "shape differs": shapes, "not sharded alike": whole}
        if any(problems.values()):
            found = {label: names for label, names in problems.items() if names}
            what = "; ".join(f"{label}: {', '.join(names[:5])} ({len(names)})" for label, names in found.items())
            hint = "the average must be of the same trainable tensors; was another part frozen?"
            raise TensorkeepError(what, where="ema", hint=hint)
        for mine, theirs in both.values():
            mine.copy_(theirs)
        self.updates = updates

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Find the averaged parameters in the model, by name."""
        root, found = _unwrap(model), {}
        # by their paths: walking the whole of a large frozen model takes longer than averaging
        for name, (*path, key) in self._paths.items():
            module: nn.Module | None = root
            for part in path:
                module = None if module is None else module._modules.get(part)
            parameter = None if module is None else module._parameters.get(key)
            if parameter is not None:
                found[name] = parameter
        missing = [name for name in self._tensors if name not in found]
        if missing:
            what = f"the model has no parameter {missing[0]} ({len(missing)} of {len(self._tensors)} are gone)"
            raise TensorkeepError(what, where="ema", hint="make the average after the model has its final form")
        return found


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that train, by names without the wrappers of DDP and torch.compile.

    Args:
        model: perhaps wrapped.

    Returns:
        Name -> parameter, in the model's order.

    Raises:
        TensorkeepError: one of them is packed codes (Q03): bitsandbytes lets codes stored as floats require gradients.
    """
    found = {n: p for n, p in _unwrap(model).named_parameters() if p.requires_grad and p.is_floating_point()}
    codes = [name for name, parameter in found.items() if getattr(parameter, "quant_state", None) is not None]
    if codes:
        what = f"holds packed codes and trains ({len(codes)} such): arithmetic on codes destroys them"
        raise TensorkeepError(what, where=codes[0], code="Q03", hint="freeze it: parameter.requires_grad_(False)")
    return found


def _unwrap(model: nn.Module) -> nn.Module:
    """Take off the wrappers of DDP and torch.compile: names must not depend on how a model is run."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _start(parameter: nn.Parameter, device: torch.device | str | None) -> Tensor:
    """The first average of a parameter: a float32 copy, page-locked where it leaves the GPU."""
    average = parameter.detach().to(device=device, dtype=torch.float32, copy=True)
    pinned = parameter.is_cuda and not average.is_cuda and not hasattr(average, "to_local")
    return average.pin_memory() if pinned else average


def _lerp(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """Move all averages toward their values by `weight`, in place."""
    torch._foreach_lerp_(averages, [v if v.dtype == torch.float32 else v.to(torch.float32) for v in values], weight)


def _local(tensor: Tensor) -> Tensor:
    """Take this process's part of a sharded tensor (averaging is element by element), any other tensor as it is."""
    # the kind first: a plain tensor asked for what it lacks takes as long as averaging it
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "to_local"):
        return tensor
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part


def _stays(parameter: nn.Parameter, copy: bool) -> bool:
    """Whether a parameter keeps its storage: a sharded one's is known elsewhere, FSDP2 gathers from it."""
    return copy or hasattr(parameter, "to_local")


def _original(parameter: nn.Parameter, copy: bool) -> Tensor:
    """Keep what restores a parameter: a copy of its values where they will be overwritten, else its own tensor."""
    return _local(parameter.detach()).clone() if _stays(parameter, copy) else parameter.data


def _put(parameter: nn.Parameter, average: Tensor, copy: bool) -> None:
    """Let a parameter hold the average."""
    if _stays(parameter, copy):
        _local(parameter.detach()).copy_(_local(average), non_blocking=True)
    else:
        parameter.data = average.to(device=parameter.device, dtype=parameter.dtype, non_blocking=True)


def _put_back(parameter: nn.Parameter, original: Tensor, copy: bool) -> None:
    """Let a parameter hold its own values again."""
    if _stays(parameter, copy):
        _local(parameter.detach()).copy_(original)
    else:
        parameter.data = original
