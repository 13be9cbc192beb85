"""Frozen linears of a backbone in 4 or 8 bits, in place, once their weights are loaded.

What QLoRA is for: the pretrained linears hold the knowledge (97 % of the ViT), stay frozen and may be coarse, while
LoRA and adapters train in full precision beside them. The q and v biases are parameters of their own and stay as they
are. The layers are `QuantLinear`, which needs no library and no GPU.
"""

from __future__ import annotations

from torch import nn

from tensorkeep.detection.model.adapters import LoRALinear, QLoRAAdapter
from tensorkeep.detection.model.config import LORA_TARGETS
from tensorkeep.detection.model.vit import Block, VisionTransformer
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.packed import Kind, kind_of


def quantize_backbone(vit: VisionTransformer, kind: Kind | int = "nf4", double: bool = True) -> int:
    """Store the frozen linears of every block (qkv, proj, fc1, fc2) as `kind`; returns how many.

    Load float weights first, or a quantized checkpoint with `load_quantized`. Under LoRA the base is packed and the
    update stays. Raises TensorkeepError, before anything is changed, where a linear still trains.
    """
    kind, places = kind_of(kind), []
    for index, block in enumerate(vit.blocks):
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


def quantize_adapters(vit: VisionTransformer, double: bool = True) -> int:
    """Store the frozen projections of every `QLoRAAdapter` in its `quantize_bits`; returns how many.

    4 bits are nf4; 8 bits are int8 without a float copy.
    """
    count = 0
    for index, block in enumerate(vit.blocks):
        assert isinstance(block, Block)
        if not isinstance(block.adapter, QLoRAAdapter):
            continue
        kind = kind_of(block.adapter.quantize_bits)
        for name in ("down_proj", "up_proj"):
            layer = getattr(block.adapter, name)
            if not isinstance(layer.base, QuantLinear):
                layer.base = QuantLinear.of(layer.base, kind, double, name=f"blocks.{index}.adapter.{name}")
                count += 1
    return count


def _dense(holder: nn.Module, name: str) -> nn.Linear:
    linear = getattr(holder, name)
    assert isinstance(linear, nn.Linear)
    return linear
