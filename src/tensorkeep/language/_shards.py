"""The start of a sharded run: a model on the meta device, sharded, and filled on each rank by what that rank keeps.

No rank ever holds the model whole. What cannot be begun so (a checkpoint whose tensors are not rows of the model's, an
architecture that must be tried before it is trained) is loaded whole on every rank, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tensorkeep.conversion import architecture
from tensorkeep.conversion import naming as namings
from tensorkeep.conversion.plan import HfTensor, Step
from tensorkeep.conversion.planning import to_hf_tensors
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import torch_dtype
from tensorkeep.formats.view import StateView
from tensorkeep.models.buffers import buffers
from tensorkeep.models.names import model_names, to_live
from tensorkeep.models.repair import repair_buffers
from tensorkeep.models.sharded_loading import read_into
from tensorkeep.quantization.linear_layers import stacked_parameters, turned
from tensorkeep.quantization.modules import spread_linears
from tensorkeep.quantization.replacing import quantizable
from tensorkeep.quantization.stored import find_quantized
from tensorkeep.training import distributed
from tensorkeep.training.distributed import World
from tensorkeep.training.fsdp import blocks, materialise, shard_modules

Tensors = dict[str, HfTensor]


def why_whole(view: StateView, tried: bool) -> str | None:
    """Say why every rank must load the whole model of a checkpoint; None where none has to.

    Args:
        view: the checkpoint that the run starts from.
        tried: whether a model of an architecture without a table is tried on a few tokens before it is trained.
    """
    config = view.config
    if config is None:
        return "no config lies beside the checkpoint"
    if "quantization_config" in config or find_quantized(view):
        return "the checkpoint is quantized"
    if tried and config.get("model_type") not in architecture.FAMILIES:
        return f"{config.get('model_type')} is tried on a few tokens before it is trained"
    return None


def prepare(view: StateView, model: nn.Module, kind: Any, world: World) -> Tensors | str:
    """Make a model on the meta device ready to be sharded and filled: buffers computed, linears ready for codes.

    Args:
        view: the checkpoint that it starts from.
        model: of the checkpoint's config, on meta; changed in place.
        kind: what its linears are quantized to; None: nothing.
        world: this process among its peers.

    Returns:
        What each of the model's tensors is made of, or why it must be loaded whole after all; one rank's reason holds
        for all.
    """
    dropped: list[Step] = []
    try:
        stored = to_hf_tensors(view, 0, namings.identify(view), view.config, dropped)
        found = to_live(view.config, stored, [view])
        ignored = model_names(view.config).ignores
    except TensorkeepError as error:
        return error.what
    tensors = found.tensors
    odd = [*found.missing, *(n for n in found.unexpected if not ignored(n))]
    held = {n: t for n, t in model.state_dict(keep_vars=True).items()}
    odd += [n for n, t in held.items() if n not in tensors or tensors[n].shape != tuple(t.shape)]
    if odd:
        return f"{odd[0]} is not in the checkpoint as the model has it"
    if not _ties_agree(held, tensors, view, world):
        return "tensors that the model ties differ in the checkpoint"
    _forget(model)
    repair_buffers(model)
    if [b for b in buffers(model) if b.tensor.is_meta] or _tensors_beside(model):
        return f"{type(model).__name__} computes what no config tells"
    if kind is not None and (
        any(stacked_parameters(model)) or any(turned(m) for m in model.modules() if quantizable(m))
    ):
        return "its stacks of experts or Conv1D layers are quantized whole"
    if kind is not None:
        spread_linears(model, kind, lambda name: torch_dtype(view, tensors[name].parts[0].name))
    return tensors


def _ties_agree(held: Mapping[str, Any], tensors: Tensors, view: StateView, world: World) -> bool:
    """Whether tensors that are one in the model are one in the checkpoint too, where it holds them twice.

    The first rank looks.
    """
    first: dict[int, str] = {}
    twice = [(n, first[id(t)]) for n, t in held.items() if first.setdefault(id(t), n) != n]
    pairs = [(tensors[a].parts, tensors[b].parts) for a, b in twice if tensors[a].parts != tensors[b].parts]
    if not world.first:
        return True
    return all([view.digest(p.name) for p in a] == [view.digest(p.name) for p in b] for a, b in pairs)


def _forget(model: nn.Module) -> None:
    """Put on meta what a model drew for itself all the same (DiffLlama's lambdas): the checkpoint has it."""
    put: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                hollow = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[key] = put.setdefault(id(parameter), hollow)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                module._buffers[key] = buffer.to("meta")


def _tensors_beside(model: nn.Module) -> list[str]:
    """List plain attributes of modules that are tensors without values: nobody would fill them."""
    return [
        f"{path}.{key}"
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta
    ]


def fill(
    model: nn.Module,
    tensors: Tensors,
    view: StateView,
    world: World,
    gathered: torch.dtype | None,
    replicas: int,
    layers: Callable[[Any], list[nn.Module]] = blocks,
) -> None:
    """Shard a prepared model and read this rank's part of every tensor; adapters, which have values, are cut.

    Args:
        model: after `prepare`, and with what trains chosen.
        tensors: from `prepare`.
        view: the checkpoint.
        world: this process among its peers.
        gathered: the dtype of 16 bits in which layers are gathered; None: their own.
        replicas: groups of ranks that hold all shards each.
        layers: what is gathered together.
    """
    shard_modules(model, layers(model), world, gathered, replicas)
    names = materialise(model, world.device)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != world.device:
                module._buffers[key] = buffer.to(world.device)
    distributed.together(world, lambda: read_into(model, names, tensors, [view]))
