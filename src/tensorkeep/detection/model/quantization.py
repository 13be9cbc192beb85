"""Quantize the frozen linears of a backbone to 4 or 8 bits, in place, once their weights are loaded.

This is QLoRA: the pretrained linears hold the knowledge (97 % of the ViT), stay frozen and may be coarse, while
LoRA and adapters train in full precision beside them. The q and v biases are parameters of their own and stay as they
are. The layers are `QuantLinear`, which needs no library and no GPU.
"""

from __future__ import annotations

import torch
from torch import nn

from tensorkeep.detection.model.adapters import LoRALinear, QLoRAAdapter
from tensorkeep.detection.model.config import LORA_TARGETS
from tensorkeep.detection.model.layers import BY_HAND, VideoBackbone
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization import float8
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import try_float8
from tensorkeep.quantization.packed import Kind, kind_of


def quantize_backbone(vit: VideoBackbone, kind: Kind | int = "nf4", double: bool = True) -> int:
    """Quantize the frozen linears of every block (qkv, proj, fc1, fc2), in place.

    Load float weights first, or a quantized checkpoint with `load_quantized`. Under LoRA the base is quantized and the
    update stays.

    Args:
        vit: the backbone.
        kind: "nf4", "fp4" or "int8", or 4 or 8 bits.
        double: whether the scales of 4-bit weights are quantized too.

    Returns:
        How many linears were quantized.

    Raises:
        TensorkeepError: A linear still trains, or the network is reversible; then nothing was changed.

    Example:
        >>> quantize_backbone(detector.backbone, "nf4")  # doctest: +SKIP
        48
    """
    kind, places = kind_of(kind), []
    if vit.config.chunk_frames == 0:
        what = "the linears of a reversible network are not quantized: they train"
        raise TensorkeepError(what, where="training.quantize_backbone", hint="leave it out")
    for index, block in enumerate(vit.parts()):
        for target in LORA_TARGETS:
            parent, _, name = target.rpartition(".")
            holder = block.get_submodule(parent)
            if isinstance(getattr(holder, name), LoRALinear):
                holder, name = getattr(holder, name), "base"
            linear = getattr(holder, name)
            if any(parameter.requires_grad for parameter in linear.parameters()):
                raise TensorkeepError(
                    f"{target} trains and cannot be quantized", where="vit", hint="freeze it first: tuning: adapter"
                )
            if not isinstance(linear, QuantLinear):
                places.append((holder, name, f"blocks.{index}.{target}"))
    for holder, name, path in places:
        setattr(holder, name, QuantLinear.of(_dense(holder, name), kind, double, name=path))
    return len(places)


def quantize_adapters(vit: VideoBackbone, double: bool = True) -> int:
    """Quantize the frozen projections of every `QLoRAAdapter` to its `quantize_bits`, in place.

    4 bits are nf4, 8 bits are int8.

    Args:
        vit: the backbone.
        double: whether the scales of 4-bit weights are quantized too.

    Returns:
        The number of linears that were quantized.
    """
    count = 0
    for index, block in enumerate(vit.parts()):
        adapter = getattr(block, "adapter", None)
        if not isinstance(adapter, QLoRAAdapter):
            continue
        kind = kind_of(adapter.quantize_bits)
        for name in ("down_proj", "up_proj"):
            layer = getattr(adapter, name)
            if not isinstance(layer.base, QuantLinear):
                layer.base = QuantLinear.of(layer.base, kind, double, name=f"blocks.{index}.adapter.{name}")
                count += 1
    return count


def compute_in_float8(vit: VideoBackbone) -> int:
    """Let the products of a frozen backbone's linears (qkv, proj, fc1, fc2) be in float8 while it trains.

    These are the products with inputs, and those for the inputs' gradients; adapters, attention and norms stay as they
    are. Evaluation, where no gradient is tracked, takes the weights as they are.

    Args:
        vit: the backbone, on its device, its frozen weights in bfloat16 or 4-bit codes.

    Returns:
        The number of linears.

    Raises:
        TensorkeepError: its blocks have no backward by hand, a linear has no float8 products, or the device has none.

    Example:
        >>> compute_in_float8(detector.backbone)  # doctest: +SKIP
        48
    """
    where, hint = "training.quantize_compute", "leave quantize_compute out"
    if not vit.by_hand or (vit.checkpointing not in BY_HAND and vit.ladders is None):
        what = f"blocks of {vit.kind} under checkpointing {vit.checkpointing} have no backward that is in float8"
        raise TensorkeepError(what, where=where, hint=f"checkpointing {' or '.join(BY_HAND)}; or {hint}")
    blocks = {f"blocks.{index}": block for index, block in enumerate(vit.parts())}
    linears = {f"{name}.{target}": b.get_submodule(target) for name, b in blocks.items() for target in LORA_TARGETS}
    for name, linear in linears.items():
        why = _why_no_float8(linear)
        if why is not None:
            raise TensorkeepError(f"{name} {why}, and has no float8 products", where=where, hint=hint)
    why = float8.why_not(next(vit.parameters()).device)
    if why is not None:
        raise TensorkeepError(why, where=where, hint=hint)
    coded = {name: linear for name, linear in linears.items() if isinstance(linear, QuantLinear)}
    for linear in coded.values():
        linear.compute_in_float8()
    if coded:
        try_float8(*next(iter(coded.items())))
    for block in blocks.values():
        block.in_float8 = True  # type: ignore[assignment]
    return len(linears)


def _why_no_float8(linear: nn.Module) -> str | None:
    """Say why a linear of a trunk has no float8 products; None where it has."""
    if isinstance(linear, QuantLinear):
        shape, int8 = linear.layout.shape, linear.kind == "int8"
    elif type(linear) is nn.Linear:
        shape, int8 = (linear.out_features, linear.in_features), False
    else:
        return "holds low-rank updates" if isinstance(linear, LoRALinear) else f"is a {type(linear).__name__}"
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "trains"
    if int8:
        return "is held in int8"
    odd = next((p.dtype for p in linear.parameters() if p.dtype != torch.bfloat16), None)
    if odd is not None:
        return f"is computed in {str(odd).removeprefix('torch.')}, not bfloat16"
    return None if float8.fits(*shape) else f"is of {shape[0]} x {shape[1]}, no multiples of 16"


def _dense(holder: nn.Module, name: str) -> nn.Linear:
    """Return the plain linear under a name."""
    linear = getattr(holder, name)
    assert isinstance(linear, nn.Linear)
    return linear
