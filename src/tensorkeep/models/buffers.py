"""Compute non-persistent buffers, which no checkpoint holds, anew from configs and from the modules themselves.

Three ways, in this order, and none touches the live model or the random state:
1. a transformers model is built again from its config, parameters on the meta device and buffers for real;
2. a module's own way on an empty copy: `_init_self_buffers` (torchtitan), `rope_init` (torchtune), `reset_parameters`
   of a module without parameters (fla), `_precompute_freqs_cis` and its like, or its class called with its `config`;
3. an `inv_freq` from the RoPE fields of the checkpoint's config.
What none of them gives has no expected value, and is said to have none.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming.rope import partial_rotary
from tensorkeep.models.refusals import REFUSALS as REFUSALS
from tensorkeep.models.tensors import clean


class Buffer(NamedTuple):
    """A non-persistent buffer of a live model, or a plain tensor that a module keeps beside one.

    Args:
        name: its name without wrappers.
        module: the module that holds it.
        key: its name in that module.
        tensor: the tensor.
        plain: whether it is an ordinary attribute and no buffer.
    """

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    plain: bool = False


class Fresh(NamedTuple):
    """What a buffer should be, on the CPU, and how that was computed; the value is None where no way is known."""

    value: Tensor | None
    way: str


def buffers(model: nn.Module) -> list[Buffer]:
    """List every non-persistent buffer of a model, and `inv_freq` copies that are plain attributes (transformers 4).

    Args:
        model: a live model.

    Returns:
        The buffers, in the order of the modules.
    """
    found = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(key)
            if tensor is not None:
                found.append(Buffer(clean(prefix + key), module, key, tensor))
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and key.endswith("inv_freq"):
                found.append(Buffer(clean(prefix + key), module, key, value, plain=True))
    return found


def fresh(model: nn.Module, config: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Fresh]:
    """Compute the right value of every non-persistent buffer of a model.

    Args:
        model: a live model; it is not changed.
        config: a checkpoint's config, used where the model itself tells nothing.
        seed: what a buffer is drawn from that its class draws at random.

    Returns:
        The values by name without wrappers, each with the way it was computed.
    """
    wanted = buffers(model)
    out: dict[str, Fresh] = {}
    why: dict[str, str] = {}
    for path, root in transformers_roots(model):
        below = [b for b in wanted if b.name not in out and _inside(b.name, path)]
        built = _rebuilt(root, seed) if below else {}
        if isinstance(built, str):
            why.update({b.name: built for b in below})
            continue
        for buffer in below:
            short = buffer.name[len(path) + 1 :] if path else buffer.name
            if short in built:
                out[buffer.name] = Fresh(built[short], "from the model's config")
    for module in dict.fromkeys(b.module for b in wanted if b.name not in out):
        mine = {b.key: b for b in wanted if b.module is module and b.name not in out}
        for key, (value, way) in _own_way(module, list(mine)).items():
            out[mine[key].name] = Fresh(value, way)
    for buffer in wanted:
        if buffer.name not in out:
            last = _frequencies(buffer, config)
            reason = why.get(buffer.name, "no way to compute it is known")
            out[buffer.name] = Fresh(
                last, reason if last is None else "from the RoPE fields of the checkpoint's config"
            )
    return out


def _inside(name: str, path: str) -> bool:
    """Whether a name lies below a path."""
    return not path or name.startswith(path + ".")


# -- 1: transformers ------------------------------------------------------------------------------------------------


def transformers_roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the topmost transformers models inside a model.

    Args:
        model: a live model.

    Returns:
        Each one's path without wrappers, and the module; nothing where transformers is not loaded.
    """
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None:
        return
    seen: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, loaded.PreTrainedModel) and not any(_inside(path, s) for s in seen):
            seen.append(path)
            yield _path(path), module


def _path(raw: str) -> str:
    """Return a module's path without wrappers, also where the last segment is one (`module`, `_orig_mod`)."""
    return clean(f"{raw}.x").rpartition(".")[0] if raw else ""


def _rebuilt(model: Any, seed: int = 0) -> dict[str, Tensor] | str:
    """Return the buffers of a new model of the same class and config, or why there can be none."""
    try:
        with _parameters_on_meta(seed):
            new = _plain_class(type(model))(copy.deepcopy(model.config))
    except REFUSALS as error:
        said = " ".join(str(error).split())[:200]
        return f"{type(model).__name__} could not be built again: {type(error).__name__}: {said}"
    return {b.name: b.tensor for b in buffers(new)}


@contextmanager
def _parameters_on_meta(seed: int = 0) -> Iterator[None]:
    """Build modules inside the block with parameters that take no memory and real buffers on the CPU, in float32."""

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    dtype = torch.get_default_dtype()
    handle = nn.modules.module.register_module_parameter_registration_hook(to_meta)
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(dtype)
        handle.remove()


def _plain_class(kind: type[Any]) -> type[Any]:
    """Return the class under the one that FSDP2 (`fully_shard`) puts in its place."""
    return next(c for c in kind.__mro__ if not any(b.__name__ == "FSDPModule" for b in c.__mro__))


# -- 2: a module's own way ------------------------------------------------------------------------------------------

_IN_PLACE = ("_init_self_buffers", "reset_buffers", "init_buffers", "rope_init", "_rope_init")


def _own_way(module: nn.Module, keys: list[str]) -> dict[str, tuple[Tensor, str]]:
    """Return what the module's own methods give for its buffers, on a copy whose buffers are NaN and on the CPU."""
    names = [n for n in _IN_PLACE if callable(getattr(module, n, None))]
    if hasattr(module, "reset_parameters") and not any(True for _ in module.parameters()):
        names.append("reset_parameters")
    for name in names:
        clone = _empty_copy(module)
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                getattr(clone, name)()
        except REFUSALS:
            continue
        values = {k: v for k in keys if (v := _tensor(clone, k)) is not None and not _unset(v)}
        made = {k: (v, f"by {type(module).__name__}.{name}") for k, v in values.items()}
        if made:
            return made
    return _computed(module, keys) or _from_config(module, keys)


def _computed(module: nn.Module, keys: list[str]) -> dict[str, tuple[Tensor, str]]:
    """Return what the module's methods compute for its buffers by name (`_precompute_freqs_cis`)."""
    made: dict[str, tuple[Tensor, str]] = {}
    for key in keys:
        for name in (f"_precompute_{key}", f"_compute_{key}", "_precompute_cache"):
            method = getattr(module, name, None)
            if not callable(method) or key in made:
                continue
            try:
                with torch.device("cpu"), torch.no_grad():
                    value = method()
            except REFUSALS:
                continue
            if isinstance(value, Tensor) and value.device.type == "cpu":
                made[key] = (value, f"by {type(module).__name__}.{name}")
    return made


def _from_config(module: nn.Module, keys: list[str]) -> dict[str, tuple[Tensor, str]]:
    """Return the buffers of a new module of this class, built from the module's `config`."""
    kind, config = _plain_class(type(module)), getattr(module, "config", None)
    if (
        config is None
        or any(True for _ in module.parameters())
        or "config" not in inspect.signature(kind.__init__).parameters
    ):
        return {}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            new = kind(config=copy.deepcopy(config))
    except REFUSALS:
        return {}
    return {k: (v, f"by {kind.__name__}(config)") for k in keys if (v := _tensor(new, k)) is not None}


def _tensor(module: nn.Module, key: str) -> Tensor | None:
    """Return an attribute that is a tensor on the CPU."""
    value = getattr(module, key, None)
    return value.detach() if isinstance(value, Tensor) and value.device.type == "cpu" else None


def _empty_copy(module: nn.Module) -> nn.Module:
    """Return a shallow copy whose buffers are new, on the CPU and filled with NaN, so that what is written shows."""
    clone = copy.copy(module)
    clone.__dict__ = {
        **module.__dict__,
        "_parameters": dict(module._parameters),
        "_buffers": {key: None if b is None else _emptied(b) for key, b in module._buffers.items()},
    }
    return clone


def _emptied(buffer: Tensor) -> Tensor:
    """Return a new CPU tensor of NaN (0 for integers) in a buffer's shape and dtype."""
    floats = buffer.is_floating_point() or buffer.is_complex()
    return torch.full(buffer.shape, math.nan if floats else 0, dtype=buffer.dtype)


def _unset(value: Tensor) -> bool:
    """Whether a buffer still holds nothing but the NaN it was filled with."""
    return (value.is_floating_point() or value.is_complex()) and value.numel() > 0 and bool(value.isnan().all())


# -- 3: RoPE's fields -------------------------------------------------------------------------------------------------


def _frequencies(buffer: Buffer, config: Mapping[str, Any] | None) -> Tensor | None:
    """Return RoPE's frequencies for a buffer, where the config gives them in the buffer's shape."""
    made = rope_frequencies(config) if config is not None and buffer.key.endswith("inv_freq") else None
    return made if made is not None and made.shape == buffer.tensor.shape else None


def rope_frequencies(config: Mapping[str, Any]) -> Tensor | None:
    """Compute RoPE's inverse frequencies from a config of type default, linear or llama3.

    Args:
        config: as config.json has it.

    Returns:
        float32 of shape (rotary / 2,); None for other types, or where sizes are missing.
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling")
    fields: dict[str, Any] = {**config, **(nested if isinstance(nested, Mapping) else {})}
    theta = fields.get("rope_theta", 10000.0)
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0
    size = fields.get("head_dim") or derived
    if not isinstance(theta, (int, float)) or not isinstance(size, int) or size < 2:
        return None
    rotary = int(size * partial_rotary(config))
    inverse: Tensor = 1.0 / (float(theta) ** (torch.arange(0, rotary, 2, dtype=torch.int64).float() / rotary))
    kind = fields.get("rope_type") or fields.get("type") or "default"
    factor = float(fields.get("factor", 1.0))
    if kind == "default":
        return inverse
    if kind == "linear":
        return inverse / factor
    if kind != "llama3":
        return None
    low, high = float(fields.get("low_freq_factor", 1.0)), float(fields.get("high_freq_factor", 4.0))
    trained = float(fields.get("original_max_position_embeddings", 8192))
    turns = trained * inverse / (2 * math.pi)  # within the trained context
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inverse / factor + blend * inverse
