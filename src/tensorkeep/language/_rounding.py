"""Round a model's layers one after the other, each on the inputs that the rounded layers before it give.

Two streams of hidden states go through the layers: that of the model as it is, which says what each layer should give,
and that of the rounded one. Linears that read the same input are rounded together, in the order in which the layer
calls them, and experts by the tokens that are sent to each; then the layer's scales, and where these are powers of
two its codes, are trained so that its output comes nearest to the wanted one.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._matrices import Matrix
from tensorkeep.quantization.grids import TRAINED, kept, level_of, nearest, spread, width_of
from tensorkeep.quantization.rounding import Rounded, rounded
from tensorkeep.quantization.stacks import placed

_STEPS, _RATE = 24, 2e-3  # of the scales' training: updates of Adam, and how far one moves a scale, relatively
_MOVES = 200  # updates of codes by the gradient's sign (AutoRound, arXiv 2309.05516)
_FAR = 0.5  # steps of a grid that one moves a number, at most
_LENT = 32  # inputs as all experts get them that an expert is given beside its own, so that none is rounded by too few
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
    model: nn.Module,
    layers: Sequence[nn.Module],
    found: Sequence[Sequence[Matrix]],
    batches: Sequence[Tensor],
    progress: Progress = lambda *_: None,
) -> dict[str, Rounded]:
    """Put rounded weights in the place of those of a model's layers, for what its layers get from these texts.

    Args:
        model: a causal language model of transformers in float32, on its device; changed in place.
        layers: its layers.
        found: the matrices of each.
        batches: token ids [rows, length] each, without padding, on that device.
        progress: called as `progress(what, layers done, layers)`.

    Returns:
        What the matrices became, by name.

    Raises:
        TensorkeepError: the layers are not called one after the other, or a matrix is not multiplied by once; V01 where
            numbers are not finite.
    """
    calls, hidden = recorded(model, layers, batches)
    wanted, made = list(hidden), {}
    for number, layer in enumerate(layers):
        progress("rounding layers", number, len(layers))
        mine = {m.name: m for m in found[number]}
        as_it_was = copy.deepcopy(layer)
        with torch.no_grad():
            wanted = [call.of(as_it_was, x) for call, x in zip(calls[number], wanted)]
            watched = _watched(layer, found[number])
            for group in _groups(watched, found[number], calls[number][0], hidden[0]):
                moments = _moments(watched, group, calls[number], hidden)
                for one in (m for m in found[number] if m.parameter in group):
                    weight = one.of(layer)
                    made[one.name] = rounded(weight, moments[one.expert], one.form, one.name)
                    weight.copy_(made[one.name].weight())
            del watched
        asked = _Layer(layer, mine, calls[number], hidden, wanted)
        made |= _codes_trained(asked, _scales_trained(asked, {n: made[n] for n in mine}))
        with torch.no_grad():
            hidden = [call.of(layer, x) for call, x in zip(calls[number], hidden)]
        del as_it_was
    progress("rounding layers", len(layers), len(layers))
    return made


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


def _watched(layer: nn.Module, found: Sequence[Matrix]) -> nn.Module:
    """Return the layer, or where it has experts a copy that takes them one by one; its matrices are the same memory."""
    stacked = {m.parameter for m in found if m.expert is not None}
    if not stacked:
        return layer
    made = copy.deepcopy(layer)
    for path in {m.parameter for m in found}:
        owner, _, key = path.rpartition(".")
        if path in stacked:
            placed(made.get_submodule(owner), key).base_layer.data = layer.get_parameter(path).data
        else:
            made.get_parameter(path).data = layer.get_parameter(path).data
    return made


Watch = Callable[[str, int | None, Tensor], None]


class _Enough(Exception):
    """What was waited for in a layer has been seen: the rest of it need not be computed."""


def _run_watched(layer: nn.Module, parameters: set[str], watch: Watch, calls: Any) -> None:
    """Run a layer, and be told what each of these parameters is multiplied by."""
    handles, lent = [], []

    def hook(path: str) -> Callable[..., None]:
        return lambda _, given: watch(path, None, given[0])

    for path in parameters:
        owner, _, key = path.rpartition(".")
        module: Any = layer.get_submodule(owner)
        if key in module._modules:
            stack = module._modules[key]
            stack.watch = lambda expert, x, path=path: watch(path, expert, x)
            lent.append((stack, module, path))
        else:
            handles.append(module.register_forward_pre_hook(hook(path)))
    try:
        for call, x in calls:
            with contextlib.suppress(_Enough):
                call.of(layer, x)
    finally:
        for handle in handles:
            handle.remove()
        for stack, _, _ in lent:
            stack.watch = None
    for _, module, path in lent:
        if module.takes_whole:
            kind = type(module).__name__.removeprefix("Stacked")
            what = f"{kind} does not multiply by one expert after the other: {path} cannot be rounded by its inputs"
            raise TensorkeepError(what, where="--to-bits")


def _groups(layer: nn.Module, found: Sequence[Matrix], call: Call, hidden: Tensor) -> list[set[str]]:
    """Return the parameters in the order in which the layer multiplies by them, those of one input together."""
    seen: dict[str, Any] = {}
    twice: list[str] = []

    def watch(path: str, expert: int | None, x: Tensor) -> None:
        if expert is None and path in seen:
            twice.append(path)
        seen.setdefault(path, (x.data_ptr(), x.shape) if expert is None else path)

    parameters = {m.parameter for m in found}
    _run_watched(layer, parameters, watch, [(call, hidden)])
    missed = [m.name for m in found if m.parameter not in seen and m.expert is None]
    if missed or twice:
        raise TensorkeepError(f"{(missed + twice)[0]} is not called once: it cannot be rounded", where="--to-bits")
    groups: list[set[str]] = []
    last: Any = None
    for path, place in seen.items():
        if place == last:
            groups[-1].add(path)
        else:
            groups.append({path})
        last = place
    return groups + [{path} for path in sorted(parameters - set(seen))]


def _moments(
    layer: nn.Module, group: set[str], calls: Sequence[Call], hidden: Sequence[Tensor]
) -> Mapping[int | None, Tensor]:
    """Return the mean of x x' over everything that the matrices of a group read; of experts, by expert."""
    totals: dict[int | None, Tensor] = {}
    counts: dict[int | None, int] = {}
    first = sorted(group)[0]

    def watch(_: str, expert: int | None, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        totals[expert] = totals.get(expert, 0) + x.T @ x
        counts[expert] = counts.get(expert, 0) + len(x)
        if expert is None:
            raise _Enough

    _run_watched(layer, {first}, watch, zip(calls, hidden))
    if None in totals:
        return {None: totals[None] / max(counts[None], 1)}
    if not totals:
        raise TensorkeepError(f"no token of the texts is sent to the experts of {first}", where="--calibrate")
    lent = torch.stack([*totals.values()]).sum(0) / max(sum(counts.values()), 1) * _LENT
    own = {e: (totals[e] + lent) / (counts[e] + _LENT) for e in totals}
    return defaultdict(lambda: lent / _LENT, own)


def _assembled(layer: nn.Module, found: Mapping[str, Matrix], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put matrices together as the layer's parameters hold them; gradients flow through."""
    parts: dict[str, dict[int | None, list[tuple[Matrix, Tensor]]]] = {}
    for name, weight in weights.items():
        one = found[name]
        parts.setdefault(one.parameter, {}).setdefault(one.expert, []).append((one, weight))
    out = {}
    for path, experts in parts.items():
        matrices = []
        for expert in sorted(experts, key=lambda e: -1 if e is None else e):
            rows = [w for m, w in sorted(experts[expert], key=lambda part: part[0].rows or (0, 0))]
            whole = rows[0] if len(rows) == 1 else torch.cat(rows)
            matrices.append(whole.T if experts[expert][0][0].turned else whole)
        out[path] = matrices[0] if None in experts else torch.stack(matrices)
    return out


class _Layer(NamedTuple):
    """A layer, its matrices by name, what it is called with and gets, and what it should give, batch by batch."""

    layer: nn.Module
    where: Mapping[str, Matrix]
    calls: Sequence[Call]
    hidden: Sequence[Tensor]
    wanted: Sequence[Tensor]

    def loss(self, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared error of the output with these weights, for one batch."""
        call, made = self.calls[number], _assembled(self.layer, self.where, weights)
        out = torch.func.functional_call(self.layer, made, (self.hidden[number], *call.rest), call.named)
        hidden_states: Tensor = out[0] if isinstance(out, tuple) else out
        return (hidden_states - self.wanted[number]).square().mean()

    @torch.no_grad()
    def whole(self, given: Mapping[str, Rounded]) -> float:
        """Return the same of all batches, added up."""
        weights = {n: one.weight() for n, one in given.items()}
        return sum(float(self.loss(k, weights)) for k in range(len(self.calls)))

    @torch.no_grad()
    def take(self, given: Mapping[str, Rounded]) -> None:
        """Put weights into the layer."""
        for name, one in given.items():
            self.where[name].of(self.layer).copy_(one.weight())


def _scales_trained(asked: _Layer, found: dict[str, Rounded]) -> dict[str, Rounded]:
    """Train the scales of a layer towards its wanted output; they stay as they are where that is no gain."""
    shares = {
        (name, key): torch.zeros_like(one.numbers[key], dtype=torch.float32, requires_grad=True)
        for name, one in found.items()
        for key in TRAINED[one.form]
    }
    if not shares:
        return found
    optimizer = torch.optim.Adam(shares.values(), _RATE)

    def moved(name: str, one: Rounded) -> dict[str, Tensor]:
        free = {k: one.numbers[k].float() * (1 + shares[name, k]) for k in TRAINED[one.form]}
        return {**one.numbers, **free}

    before = asked.whole(found)
    for step in range(_STEPS):
        optimizer.zero_grad()
        weights = {n: one.weight(moved(n, one)) for n, one in found.items()}
        asked.loss(step % len(asked.calls), weights).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        made = {n: one._replace(numbers=kept(one.form, moved(n, one))) for n, one in found.items()}
    if not asked.whole(made) < before:
        return found
    asked.take(made)
    return made


def _codes_trained(asked: _Layer, found: dict[str, Rounded]) -> dict[str, Rounded]:
    """Move codes that say what they were rounded from, so that the layer's output is nearer; none where that fails.

    The forward has the rounded numbers, the gradient passes the rounding, and a number moves half a step at most.
    """
    free = {n: one for n, one in found.items() if one.before is not None}
    if not free:
        return found
    scales = {n: spread(one.form, one.numbers, (one.codes.shape[0], one.codes.shape[1]))[0] for n, one in free.items()}
    units = {n: one.before / scales[n] for n, one in free.items() if one.before is not None}
    widths = {n: width_of(units[n], one.form) for n, one in free.items()}
    moves = {n: torch.zeros_like(unit, requires_grad=True) for n, unit in units.items()}
    fixed = {n: one.weight() for n, one in found.items() if n not in free}
    settled = {n: one._replace(before=None) for n, one in found.items()}

    def weight(name: str) -> Tensor:
        unit = units[name] + moves[name] * widths[name]
        return (unit + (level_of(unit.detach(), free[name].form) - unit).detach()) * scales[name]

    for step in range(_MOVES):
        weights = fixed | {n: weight(n) for n in free}
        asked.loss(step % len(asked.calls), weights).backward()  # type: ignore[no-untyped-call]
        for move in moves.values():
            assert move.grad is not None
            rate = (1 - step / _MOVES) / _MOVES
            move.data.sub_(move.grad.sign_(), alpha=rate).clamp_(-_FAR, _FAR)
            move.grad = None
    with torch.no_grad():
        codes = {n: nearest(units[n] + moves[n] * widths[n], one.form) for n, one in free.items()}
    made = {n: one._replace(codes=codes.get(n, one.codes)) for n, one in settled.items()}
    if not asked.whole(made) < asked.whole(settled):
        return settled
    asked.take(made)
    return made
