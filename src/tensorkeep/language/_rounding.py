"""Round a model's layers one after the other, each on the inputs that the rounded layers before it give.

Two streams of hidden states go through the layers: that of the model as it is, which says what each layer should give,
and that of the rounded one. Linears that read the same input are rounded together, in the order in which the layer
calls them; then the layer's scales are trained so that its output comes nearest to the wanted one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches
from tensorkeep.quantization.linear_layers import dense
from tensorkeep.quantization.replacing import clean_name, left_wide, tied_parameters
from tensorkeep.quantization.rounding import FourBits, Rounded, rounded
from tensorkeep.training.fsdp import blocks

_STEPS, _RATE = 60, 2e-3  # of the scales' training: updates of Adam, and how far one moves a scale, relatively
Progress = Callable[[str, int, int], None]


class Call(NamedTuple):
    """What a layer is called with beside the hidden states."""

    rest: tuple[Any, ...]
    named: dict[str, Any]

    def of(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the layer's hidden states for others."""
        made = layer(hidden, *self.rest, **self.named)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out


def round_layers(
    model: nn.Module, batches: Sequence[Tensor], kind: FourBits, progress: Progress = lambda *_: None
) -> dict[str, Rounded]:
    """Put rounded weights in the place of the linears of a model's layers, for what its layers get from these texts.

    Args:
        model: a causal language model of transformers in float32, on its device; changed in place.
        batches: token ids [rows, length] each, without padding, on that device.
        kind: the table of codes.
        progress: called as `progress(what, layers done, layers)`.

    Returns:
        What the linears became, by name.

    Raises:
        TensorkeepError: the model has no list of layers that are called with hidden states, or holds large weights in
            its layers that are no linears (stacked experts); V01 where numbers are not finite.
    """
    layers = [layer for layer in blocks(model) if isinstance(layer, nn.Module)]
    names = {id(module): clean_name(name) for name, module in model.named_modules()}
    chosen = _linears(model, layers, names)
    calls, hidden = recorded(model, layers, batches)
    wanted, found = list(hidden), {}
    for number, layer in enumerate(layers):
        progress("rounding layers", number, len(layers))
        mine = {names[id(m)]: m for m in layer.modules() if names[id(m)] in chosen and isinstance(m, nn.Linear)}
        as_it_was = copy.deepcopy(layer)
        with torch.no_grad():
            wanted = [call.of(as_it_was, x) for call, x in zip(calls[number], wanted)]
            for group in _groups(layer, mine, calls[number][0], hidden[0]):
                moment = _moment(layer, mine[group[0]], calls[number], hidden)
                for name in group:
                    found[name] = rounded(mine[name].weight, moment, kind, name=name)
                    mine[name].weight.data.copy_(found[name].weight())
        found |= _scales_trained(layer, {n: found[n] for n in mine}, mine, calls[number], hidden, wanted)
        with torch.no_grad():
            hidden = [call.of(layer, x) for call, x in zip(calls[number], hidden)]
        del as_it_was
    progress("rounding layers", len(layers), len(layers))
    return found


def _linears(model: nn.Module, layers: Sequence[nn.Module], names: Mapping[int, str]) -> set[str]:
    """Return the names of the linears that become codes; refuse a model whose layers hold more than linears."""
    wide, tied = left_wide(model), tied_parameters(model)
    chosen, large = set(), []
    for layer in layers:
        for module in layer.modules():
            name = names[id(module)]
            if dense(module) and id(module.weight) not in tied and not any(matches(name, [w]) for w in wide):
                chosen.add(name)
            else:
                large += [f"{name}.{key}" for key, p in module._parameters.items() if p is not None and p.dim() > 2]
    if large or not chosen:
        what = f"{large[0]} is no linear" if large else f"{type(model).__name__} has no layers of linears"
        raise TensorkeepError(f"{what}: its merge is not rounded to 4 bits here", where="--to-bits")
    return chosen


def recorded(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[list[Call]], list[Tensor]]:
    """Run a model, and note how its layers are called.

    Args:
        model: a causal language model of transformers.
        layers: its layers, in the order in which they are called.
        batches: token ids [rows, length] each, on the model's device.

    Returns:
        What each layer is called with for each batch, and the hidden states that the first one gets.

    Raises:
        TensorkeepError: a layer is not called once a batch.
    """
    calls: list[list[Call]] = [[] for _ in layers]
    first: list[Tensor] = []

    def note(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            named = dict(named)
            hidden = given[0] if given else named.pop("hidden_states")
            calls[number].append(Call(tuple(given[1:]), named))
            if number == 0:
                first.append(hidden)

        return hook

    handles = [layer.register_forward_pre_hook(note(k), with_kwargs=True) for k, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if any(len(found) != len(batches) for found in calls):
        what = f"{type(model).__name__} does not call each of its layers once"
        raise TensorkeepError(f"{what}: they cannot be run one by one", where="merge")
    return calls, first


def _groups(layer: nn.Module, linears: Mapping[str, nn.Linear], call: Call, hidden: Tensor) -> list[list[str]]:
    """Return the layer's linears as it calls them, those beside each other that read one input together."""
    seen: list[tuple[Any, str]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _, given: seen.append(((given[0].data_ptr(), given[0].shape), name))

    handles = [linear.register_forward_pre_hook(note(name)) for name, linear in linears.items()]
    try:
        call.of(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    for at, (place, name) in enumerate(seen):
        if at and seen[at - 1][0] == place:
            groups[-1].append(name)
        else:
            groups.append([name])
    missed = [[name] for name in linears if name not in {n for _, n in seen}]
    if missed or len({n for _, n in seen}) != len(seen):
        odd = missed[0][0] if missed else seen[-1][1]
        raise TensorkeepError(f"{odd} is not called once: it cannot be rounded by its inputs", where="--to-bits")
    return groups


def _moment(layer: nn.Module, linear: nn.Linear, calls: Sequence[Call], hidden: Sequence[Tensor]) -> Tensor:
    """Return the mean of x x' over everything that a linear of a layer reads."""
    total = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
    count = 0

    def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal count
        x = given[0].reshape(-1, linear.in_features).float()
        total.add_(x.T @ x)
        count += len(x)

    handle = linear.register_forward_pre_hook(add)
    try:
        for call, x in zip(calls, hidden):
            call.of(layer, x)
    finally:
        handle.remove()
    return total / max(count, 1)


def _scales_trained(
    layer: nn.Module,
    found: dict[str, Rounded],
    linears: Mapping[str, nn.Linear],
    calls: Sequence[Call],
    hidden: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> dict[str, Rounded]:
    """Train the scales of a layer towards its wanted output; they stay as they are where that is no gain."""
    inside = {id(module): name for name, module in layer.named_modules()}
    shares = {name: torch.zeros_like(one.scales, requires_grad=True) for name, one in found.items()}
    optimizer = torch.optim.Adam(shares.values(), _RATE)

    def weights() -> dict[str, Tensor]:
        return {
            f"{inside[id(linears[n])]}.weight": one.weight(one.scales * (1 + shares[n])) for n, one in found.items()
        }

    def loss(number: int, made: dict[str, Tensor]) -> Tensor:
        call = calls[number]
        out = torch.func.functional_call(layer, made, (hidden[number], *call.rest), call.named)
        hidden_states: Tensor = out[0] if isinstance(out, tuple) else out
        return (hidden_states - wanted[number]).square().mean()

    def whole() -> float:
        with torch.no_grad():
            made = weights()
            return sum(float(loss(k, made)) for k in range(len(calls)))

    before = whole()
    for step in range(_STEPS):
        optimizer.zero_grad()
        loss(step % len(calls), weights()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not whole() < before:
        return found
    with torch.no_grad():
        made = {n: one._replace(scales=one.scales * (1 + shares[n])) for n, one in found.items()}
        for name, one in made.items():
            linears[name].weight.copy_(one.weight())
    return made
