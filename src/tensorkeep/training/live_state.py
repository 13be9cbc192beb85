"""Take weights and optimizer state from live objects by name, and put them back by name.

Weights keep the dtype they are trained in, tied ones are taken once; optimizer state goes by parameter name. Frozen
weights are left out where the job names its base: they are compared by digest instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorkeep.errors import TensorkeepError
from tensorkeep.training import _sharding as sharding
from tensorkeep.training._names import Names


@torch.no_grad()
def stored_tensors(
    model: nn.Module, base: bool, names: Names | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """List the tensors of a model that a checkpoint keeps.

    Args:
        model: the live model.
        base: keep only what trains and the buffers that training changes; frozen parameters and the codes of quantized
            modules (those that say `frozen_state`) belong to the base.
        names: what is known of this model, and this `base`, from a call before.

    Returns:
        Tensors by name, not copied; and for each name that is tied to one of them, that one's name.
    """
    names = names or Names()
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in names.entries(model, lambda: _entries(model, base)):
        if not isinstance(value, Tensor):
            continue
        place: tuple[Any, ...] = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if not value.numel() or value.data_ptr() == 0:  # empty or sharded: no address of its own
            place = (id(value),)
        if place in first:
            ties[name] = first[place]
        else:
            first[place] = name
            tensors[name] = names.detached(name, value)
    return tensors, ties


def _entries(model: nn.Module, base: bool) -> list[tuple[str, Any]]:
    """List the entries of a model's state dict, without tensors that belong to a base."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad} if base else set()
    if base:
        for path, module in model.named_modules():
            if getattr(module, "frozen_state", False):
                prefix = f"{path}." if path else ""
                frozen |= {prefix + n for n in module.state_dict()} - _trainable(module, prefix)
    found = model.state_dict(keep_vars=True).items()
    return [(name, value) for name, value in found if not isinstance(value, Tensor) or name not in frozen]


def undeclared(model: nn.Module, names: Names | None = None) -> list[str]:
    """List entries of a model's state that are no tensors (a module's extra state), which checkpoints leave out.

    Args:
        model: the live model.
        names: what `stored_tensors` found of it.
    """
    found = (names or Names()).entries(model, lambda: list(model.state_dict(keep_vars=True).items()))
    return [name for name, value in found if not isinstance(value, Tensor)]


def _trainable(module: nn.Module, prefix: str) -> set[str]:
    """Names of a module's parameters that train."""
    return {prefix + n for n, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_tensors(model: nn.Module, saved: Mapping[str, Tensor], base: bool) -> None:
    """Copy saved tensors into a model, all or nothing: names, shapes and dtypes are compared first.

    Args:
        model: changed in place.
        saved: tensors by name, as `stored_tensors` gave them.
        base: whether the model's frozen parameters belong to a base.

    Raises:
        TensorkeepError: lists what is missing, unexpected or has another shape or dtype (K01).
    """
    mine, coded = check_tensors(model, saved, base)
    inside = {name for names in coded.values() for name in names}
    for path, names in coded.items():  # first: these refuse what does not belong together
        prefix = f"{path}." if path else ""
        part = {n[len(prefix) :]: saved[n] for n in names}
        module = model.get_submodule(path)
        own = {n for n, _ in module.named_parameters()}  # copied below, so they alone may be missing here
        report = module.load_state_dict(part, strict=False)
        if report.unexpected_keys or set(report.missing_keys) - own:
            left = sorted({*report.unexpected_keys, *report.missing_keys} - own)
            raise TensorkeepError(
                f"{path}: {', '.join(left)} would be dropped or left alone", where="resume", code="K01"
            )
    for name, tensor in mine.items():
        if name not in inside and not sharding.same_memory(saved[name], tensor):
            tensor.copy_(sharding.like(saved[name], tensor))


def check_tensors(
    model: nn.Module, saved: Mapping[str, Tensor], base: bool
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Compare names, shapes and dtypes of saved tensors, which may lie on meta, with the model's.

    Args:
        model: the live model.
        saved: tensors by name.
        base: whether the model's frozen parameters belong to a base.

    Returns:
        The model's tensors by name, and for each module that stores others than it holds, their names.

    Raises:
        TensorkeepError: lists what is missing, unexpected or has another shape or dtype (K01).
    """
    mine, _ = stored_tensors(model, base)
    coded = _coded(model, mine)
    inside = {name for names in coded.values() for name in names}
    refuse_difference("model", _kinds(mine, inside), _kinds(saved, inside))
    return mine, coded


def _coded(model: nn.Module, mine: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Find modules that store other tensors than they hold (codes with a description), and the stored names."""
    own = nn.Module._save_to_state_dict
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if type(module)._save_to_state_dict is own:
            continue
        held = {prefix + n for n, _ in module.named_parameters(recurse=False)}
        if names := [n for n in mine if n.startswith(prefix) and n not in held]:
            found[path] = names
    return found


def _kinds(tensors: Mapping[str, Tensor], free: set[str]) -> dict[str, str]:
    """Describe each tensor, but not those named in `free`: a description of codes may differ in length."""
    return {n: "" if n in free else _kind(t) for n, t in tensors.items()}


def _kind(tensor: Tensor) -> str:
    """Dtype and shape of a tensor, as a text."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def refuse_difference(what: str, mine: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Raise one error that lists every name on one side only, and every pair that differs.

    Args:
        what: what is compared, for the error.
        mine: name -> description of what the run has.
        saved: name -> description of what the checkpoint has.

    Raises:
        TensorkeepError: the two differ (K01).
    """
    differing = [n for n in sorted(mine.keys() & saved.keys()) if mine[n] != saved[n]]
    lists = (
        ("missing from the checkpoint", sorted(mine.keys() - saved.keys())),
        ("not in the run", sorted(saved.keys() - mine.keys())),
        ("different", [f"{n} ({saved[n]}, now {mine[n]})" for n in differing]),
    )
    parts = [f"{label}: {', '.join(names[:4])} ({len(names)})" for label, names in lists if names]
    if parts:
        raise TensorkeepError(
            f"{what}: {'; '.join(parts)}",
            where="resume",
            code="K01",
            hint="resume with the recipe of the run, or start anew in another folder (--out)",
        )


# -- optimizer --------------------------------------------------------------------------------------------------------


def _names(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """Name parameters by their `id`; refuse an optimizer that trains what is not in the model."""
    names = {id(p): n for n, p in model.named_parameters()}
    lost = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if lost:
        raise TensorkeepError(
            f"{len(lost)} parameters of the optimizer are not in the model, the first of shape {list(lost[0].shape)}",
            where="optimizer",
            hint="make what trains a part of job.model, so that its name can be kept",
        )
    return names


def optimizer_state(
    model: nn.Module, optimizer: Optimizer, known: Mapping[int, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state by name.

    Args:
        model: names the parameters.
        optimizer: over parameters of the model.
        known: names of parameters by their `id`; where one is missing, or with None, the model is asked.

    Returns:
        Tensors as `parameter/slot`, not copied; and a plain document with the optimizer's class (`kind`), each group's
        hyper-parameters with the names of its parameters (`groups`), and state that is no tensor (`values`).
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    names = known if known and all(id(p) in known for p in trained) else _names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter in trained:  # the same order on every rank
        name = names[id(parameter)]
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = value.detach() if value.requires_grad else value
            else:
                values.setdefault(name, {})[slot] = value
    groups = [
        {k: _plain(v) for k, v in group.items() if k != "params"} | {"names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"kind": type(optimizer).__name__, "groups": groups, "values": values}


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON keeps it."""
    return value.item() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def put_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    adopt: bool = False,
) -> None:
    """Give every parameter its optimizer state back, by name; hyper-parameters stay as they are.

    Args:
        model: names the parameters.
        optimizer: its state is replaced.
        tensors: as `optimizer_state` gave them.
        document: as `optimizer_state` gave it.
        adopt: nobody else holds these tensors, so those that lie on the right device are kept, not copied; not where
            few of them would keep the memory of all.

    Raises:
        TensorkeepError: the optimizer is of another class (R04), or there is state of other parameters (K01).
    """
    if document["kind"] != type(optimizer).__name__:
        raise TensorkeepError(
            f"the checkpoint is of {document['kind']}, the run uses {type(optimizer).__name__}",
            where="resume",
            code="R04",
        )
    names = _names(model, optimizer)
    parameters = {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}
    by_name: dict[str, dict[str, Any]] = {name: dict(slots) for name, slots in document["values"].items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        by_name.setdefault(name, {})[slot] = value
    unknown = sorted(by_name.keys() - parameters.keys())
    if unknown:  # a parameter that never got a gradient has none, so less is no fault
        known = dict.fromkeys(parameters.keys() & by_name, "state")
        refuse_difference("optimizer", known, dict.fromkeys(by_name, "state"))
    optimizer.state.clear()
    for name, slots in by_name.items():
        parameter, group = parameters[name]
        on_device = group.get("capturable") or group.get("fused")
        optimizer.state[parameter] = {
            # torch keeps the counter on the CPU unless a kernel reads it
            slot: _slot(value, parameter, slot != "step" or bool(on_device), adopt)
            if isinstance(value, Tensor)
            else value
            for slot, value in slots.items()
        }
    if adopt:
        _let_go(optimizer, tensors)


def _slot(value: Tensor, parameter: Tensor, to_device: bool, adopt: bool) -> Tensor:
    """One state tensor, laid out and spread as its parameter is."""
    if value.shape == parameter.shape and sharding.sharded([parameter]):
        return sharding.like(value, parameter)
    if value.shape == parameter.shape and value.stride() != parameter.stride():  # as the optimizer would lay it out
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device if to_device else "cpu", copy=not adopt)


def _let_go(optimizer: Optimizer, loaded: Mapping[str, Tensor]) -> None:
    """Copy what was kept of a file where most was not: a counter alone would keep the memory of all of it."""
    places = {(t.device, t.data_ptr()) for t in loaded.values() if t.numel() and not sharding.sharded([t])}
    states = [(slots, k, v) for slots in optimizer.state.values() for k, v in slots.items() if isinstance(v, Tensor)]
    kept = [s for s in states if not sharding.sharded([s[2]]) and (s[2].device, s[2].data_ptr()) in places]
    if sum(value.nbytes for _, _, value in kept) * 2 < sum(t.nbytes for t in loaded.values()):
        for slots, slot, value in kept:
            slots[slot] = value.clone()
