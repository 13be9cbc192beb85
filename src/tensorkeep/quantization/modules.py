"""Quantize the linears of a model in place, adopt those of bitsandbytes, and prove them equal across processes.

4 bits are 4 bits and 8 bits are 8: nothing of a quantized weight stays in floats. Heads, embeddings and whatever
trains or is tied keep their floats, and every pattern must fit something. Loading is in `loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization import float8
from tensorkeep.quantization.encoding import EXCLUDED
from tensorkeep.quantization.frozen import FOUR_BIT_ROLES, float8_weight, frozen_state
from tensorkeep.quantization.linear import HELD, QuantLinear
from tensorkeep.quantization.linear_layers import stacked_parameters
from tensorkeep.quantization.packed import WEIGHT_DIGEST, Kind, kind_of, packed_digest
from tensorkeep.quantization.reading import read_packed
from tensorkeep.quantization.replacing import (
    check_patterns,
    clean_name,
    left_wide,
    over,
    quantizable,
    replace_modules,
    selected,
    tied_parameters,
)
from tensorkeep.quantization.spreading import hollow
from tensorkeep.quantization.stacks import Stack, quantize_stack, stacks

_BITSANDBYTES = ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


def quantize_(
    model: nn.Module,
    kind: Kind | int = "nf4",
    double: bool = True,
    block: int = 64,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = EXCLUDED,
) -> list[str]:
    """Quantize the frozen linears and stacks of experts of a loaded model, in place.

    A linear that trains, or whose weight is tied to another module's, stays as it is. How patterns work:
    docs/concepts/patterns.md.

    Args:
        model: the model; its linears are replaced by `QuantLinear`, parameters that stack experts by `Stack`.
        kind: "nf4", "fp4", "int8", or 4 or 8 bits.
        double: quantize the scales as well (nf4, fp4).
        block: number of flat elements that share a scale (nf4, fp4).
        include: patterns of the linears to quantize.
        exclude: patterns of those to leave.

    Returns:
        The names of the linears, and of the stacks, that are quantized now.

    Raises:
        TensorkeepError: nothing is left to quantize, or a pattern of `include` fits no linear.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).requires_grad_(False)
        >>> quantize_(model, "nf4", exclude=["1"])
        ['0']
    """
    kind = kind_of(kind)
    linears = {clean_name(n): m for n, m in model.named_modules() if quantizable(m)}
    piles = {clean_name(f"{p}.{n}" if p else n): (m, n) for p, m, n in stacked_parameters(model)}
    check_patterns({**linears, **piles}, include, "include")
    chosen = {n: m for n, m in linears.items() if selected(n, include, exclude)}
    tied = tied_parameters(model)
    free = {n: m for n, m in chosen.items() if not m.weight.requires_grad and id(m.weight) not in tied}
    frozen = [
        n for n, (m, k) in piles.items() if selected(n, include, exclude) and not m.get_parameter(k).requires_grad
    ]
    if not free and not frozen:
        trains = sum(m.weight.requires_grad for m in chosen.values())
        raise TensorkeepError(
            f"no linear to quantize: of {len(linears)}, {len(linears) - len(chosen)} are excluded and {trains} train",
            where="quantize",
            hint="freeze the model first: model.requires_grad_(False)"
            if trains
            else f"linears here: {', '.join(list(linears)[:6])}",
        )
    names = list(free)
    del linears, chosen  # one at a time, so that the floats of each are freed before the next
    for name in names:
        linear = free.pop(name)
        replace_modules(model, {linear: over(linear, QuantLinear.of(linear, kind, double, block, name))})
    for name in frozen:
        quantize_stack(*piles.pop(name), kind, double, block, name)
    return names + frozen


def spread_linears(model: nn.Module, kind: Kind, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Put quantized layers without values in the place of the linears of a model on meta, codes ready to be sharded.

    Args:
        model: changed in place, and frozen.
        kind: "nf4", "fp4" or "int8".
        dtype_of: the dtype in which a weight of this name is stored.
    """
    model.requires_grad_(False)
    tied, wide = tied_parameters(model), left_wide(model)
    chosen = {clean_name(n): m for n, m in model.named_modules() if quantizable(m) and id(m.weight) not in tied}
    for name, linear in chosen.items():
        if selected(name, ("*",), wide):
            dtype = str(dtype_of(f"{name}.weight")).removeprefix("torch.")
            shape: Any = (linear.out_features, linear.in_features)
            bias: Any = linear.bias
            layer = QuantLinear(hollow(kind, shape, True, 64, dtype), bias)
            layer.spread()
            replace_modules(model, {linear: over(linear, layer)})


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized linears of a model by name.

    Args:
        model: the model; wrappers of DDP, FSDP2 and torch.compile are left out of the names.
    """
    return {clean_name(n): m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


# -- bitsandbytes -------------------------------------------------------------------------------------------------


def is_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether this is one of bitsandbytes' linears; the library is not imported to find out.

    Args:
        module: any module.
    """
    return any(k.__module__.startswith("bitsandbytes.") and k.__name__ in _BITSANDBYTES for k in type(module).__mro__)


def adopt(model: nn.Module) -> list[str]:
    """Turn bitsandbytes' linears into ours, in place, without quantizing again.

    Codes and scales are shared, not copied.

    Args:
        model: the model; changed in place.

    Returns:
        The names of the linears.

    Raises:
        TensorkeepError: before anything is changed, for layers that hold no quantized weight yet, keep floats
            (int8 with `has_fp16_weights`, Q01), or were repacked for one machine's kernel by a forward in
            evaluation mode (Q06).
    """
    found = {clean_name(n): m for n, m in model.named_modules() if is_bitsandbytes(m)}
    replace_modules(model, {module: adopted(module, name) for name, module in found.items()})
    return list(found)


def adopted(module: Any, name: str = "linear") -> QuantLinear:
    """Return one of bitsandbytes' linears as ours; codes and scales are shared.

    Args:
        module: the linear.
        name: what messages call it.

    Raises:
        TensorkeepError: as `adopt`.
    """
    weight, shape = module.weight, (module.out_features, module.in_features)
    if hasattr(weight, "quant_type"):
        state = getattr(weight, "quant_state", None)
        if state is None:
            hint = "it quantizes when it is moved: model.to(device), then adopt"
            raise TensorkeepError("holds floats still", where=name, code="Q01", hint=hint)
        tensors = {
            "layer.weight": weight.data,
            **{f"layer.weight.{k}": v for k, v in state.as_dict(packed=True).items()},
        }
    else:
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        if weight.has_fp16_weights or weight.dtype != torch.int8 or scales is None:
            hint = "build it with has_fp16_weights=False and move it to a device: only then are 8 bits 8 bits"
            raise TensorkeepError("keeps float weights", where=name, code="Q01", hint=hint)
        tensors = {"layer.weight": weight.data, "layer.SCB": scales}
    try:
        packed = read_packed(tensors, shape)
    except TensorkeepError as error:
        hint = "an evaluation forward repacks it on some CPUs: load it again and adopt before the first forward"
        raise TensorkeepError(error.what, where=name, code=error.code, hint=hint) from None
    made = QuantLinear(packed, module.bias)
    return made.train(module.training)


# -- processes ----------------------------------------------------------------------------------------------------


def check_ranks(model: nn.Module, peers: bool = True) -> None:
    """Prove that codes and scales belong together and are the same on every process; call it before the first step.

    Layers that are spread over ranks are not looked at: no rank has codes of its own that could differ.

    DDP sends buffers when it wraps a model, unless it is told not to (`broadcast_buffers=False`, which spares sending
    all codes at every forward: build each rank from the same file, check, and use that).

    Args:
        model: the model, on every rank.
        peers: compare with the other processes of the group, where there is one; all of them must then call this.

    Raises:
        TensorkeepError: Q02 with the first layer that differs and the ranks that hold something else.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if not layer.spread_out}
    found = {name: packed_digest(layer.packed).hex() for name, layer in layers.items()}
    found |= {clean_name(name): stack.digest().hex() for name, stack in stacks(model) if stack.layout is not None}
    for name, layer in layers.items():
        if found[name] != bytes(layer.get_buffer(WEIGHT_DIGEST).cpu().tolist()).hex():
            what = "codes and scales changed since they were quantized or loaded"
            raise TensorkeepError(what, where=name, code="Q02", hint="load the checkpoint again")
    if not peers or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    for name in dict.fromkeys(n for theirs in gathered for n in theirs):
        ranks = [rank for rank, theirs in enumerate(gathered) if theirs.get(name) != gathered[0].get(name)]
        if ranks:
            raise TensorkeepError(
                f"is not the same on ranks 0 and {', '.join(map(str, ranks))}",
                where=name,
                code="Q02",
                hint="load the same checkpoint on every rank, or quantize from one seed",
            )


def compute_in_float8(model: nn.Module) -> list[str]:
    """Let the products of a model's 4-bit linears with inputs and gradients be in float8 while it trains.

    Evaluation, merges and state dicts are not touched: they take the weight as its codes have it.

    Args:
        model: on its device, quantized; linears of other kinds, and of sizes that are no multiple of 16, stay as they
            are.

    Returns:
        The names of the linears.

    Raises:
        TensorkeepError: the device has no float8 products, or there is no such linear.

    Example:
        >>> model = nn.Sequential(QuantLinear.of(nn.Linear(64, 32)), nn.Linear(32, 32))
        >>> compute_in_float8(model)
        ['0']
    """
    found = {clean_name(n): m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    fit = {n: m for n, m in found.items() if m.kind != "int8" and float8.fits(*m.layout.shape) and not m.spread_out}
    if not fit:
        what = f"of {len(found)} quantized linears none has 4-bit codes and sizes that are multiples of 16"
        raise TensorkeepError(
            what, where="quantize_compute", hint="quantize_backbone: nf4, or leave quantize_compute out"
        )
    for device in {m.weight.device for m in fit.values()}:
        why = float8.why_not(device)
        if why is not None:
            raise TensorkeepError(why, where="quantize_compute", hint="leave quantize_compute out")
    for name, layer in fit.items():
        layer.compute_in_float8()
        if name == next(iter(fit)):
            try_float8(name, layer)
    return list(fit)


def try_float8(name: str, layer: QuantLinear) -> None:
    """Stop where a device's kernel rounds the weight of a layer otherwise than torch does.

    Args:
        name: of the layer.
        layer: one whose products are in float8.

    Raises:
        TensorkeepError: the bits differ.
    """
    how, state = frozen_state(layer)
    wide = layer.dequantize()
    for turned in (False, True):
        scale = state[len(FOUR_BIT_ROLES) + turned][:, None]
        wanted = float8.rounded(wide.T if turned else wide, scale).contiguous()
        found = float8_weight(how, state, turned).contiguous()
        if not torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
            what = "the kernel that rounds codes to float8 gives other bits than torch on this device"
            raise TensorkeepError(what, where=name, hint="leave quantize_compute out")


# -- sizes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What a model holds, counted by logical shapes: a packed weight counts all the parameters that it stands for.

    Attributes:
        trainable: parameters that train.
        frozen: parameters that do not.
        quantized: of the frozen ones, those that are codes.
        bytes: of all parameters and persistent buffers, as they are stored.
        trainable_bytes: of the parameters that train.
    """

    trainable: int
    frozen: int
    quantized: int  # of the frozen ones
    bytes: int  # of all parameters and persistent buffers as they are stored
    trainable_bytes: int

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.trainable + self.frozen

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.parameters, 1)
        return (
            f"{self.parameters:,} parameters, {self.trainable:,} train ({share:.2f} %), {self.quantized:,} quantized; "
            f"{self.bytes / 1e6:,.1f} MB, {self.trainable_bytes / 1e6:,.1f} MB of them train"
        )


def model_sizes(model: nn.Module) -> Sizes:
    """Count the parameters and bytes of a model; tied tensors count once, buffers count as bytes only.

    >>> model_sizes(nn.Sequential(QuantLinear.of(nn.Linear(64, 32)))).parameters
    2080
    """
    trainable = frozen = quantized = stored = training = 0
    for tensor, count, packed in _held(model):
        size = tensor.numel() * tensor.element_size()
        stored += size
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            trainable, training = trainable + count, training + size
        else:
            frozen, quantized = frozen + count, quantized + (count if packed else 0)
    return Sizes(trainable, frozen, quantized, stored, training)


def _held(model: nn.Module) -> Iterator[tuple[Tensor, int, bool]]:
    """Give every stored tensor once: it, the parameters it stands for, whether it is packed."""
    seen: set[int] = set()
    for module in model.modules():
        own = isinstance(module, QuantLinear)
        if isinstance(module, Stack) and module.layout is not None:
            sizes = [t for t in module.buffers(recurse=False)]
            yield from ((t, module.shape.numel() if t is module.weight else 0, t is module.weight) for t in sizes)
            seen |= {id(t) for t in sizes}
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or id(tensor) in seen or key in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            if own and key in HELD:
                assert isinstance(module, QuantLinear)
                yield tensor, module.in_features * module.out_features if key == "weight" else 0, key == "weight"
            elif key in module._buffers:
                yield tensor, 0, False
            elif is_bitsandbytes(module) and key == "weight" and not tensor.is_floating_point():
                yield tensor, int(getattr(module, "in_features")) * int(getattr(module, "out_features")), True  # noqa: B009
            else:
                yield tensor, tensor.numel(), False
