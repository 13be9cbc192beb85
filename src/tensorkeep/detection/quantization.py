"""Frozen linears of a backbone in 4 or 8 bits (bitsandbytes), in place, once their weights are loaded.

What QLoRA is for: the pretrained linears hold the knowledge, stay frozen and may be coarse, while LoRA and adapters
train in full precision beside them. The q and v biases are parameters of their own and stay as they are.
"""

from __future__ import annotations

from torch import nn

from tensorkeep.detection.adapters import LORA_TARGETS, LoRALinear, QLoRAAdapter
from tensorkeep.detection.vit import Block, VisionTransformer
from tensorkeep.errors import TensorkeepError


def quantize_backbone(vit: VisionTransformer) -> int:
    """Store the frozen linears of every block (qkv, proj, fc1, fc2) in nf4, doubly quantised; returns how many.

    Load weights first: packed codes take none. Under LoRA the base is packed and the update stays. Raises
    TensorkeepError where a linear still trains, and without bitsandbytes.
    """
    count = 0
    for block in vit.blocks:
        for target in LORA_TARGETS:
            parent = block.get_submodule(target.rpartition(".")[0])
            holder, name = parent, target.rpartition(".")[2]
            if isinstance(getattr(parent, name), LoRALinear):
                holder, name = getattr(parent, name), "base"
            linear = getattr(holder, name)
            if any(parameter.requires_grad for parameter in linear.parameters()):
                raise TensorkeepError(
                    f"{target} trains and cannot be quantised", where="vit", hint="freeze it first: tuning: adapter"
                )
            setattr(holder, name, _quantized(linear, 4))
            count += 1
    return count


def quantize_adapters(vit: VisionTransformer) -> int:
    """Store the frozen projections of every `QLoRAAdapter` in its `quantize_bits`; returns how many.

    4 bits are nf4; 8 bits are int8 without a float copy. Raises TensorkeepError without bitsandbytes.
    """
    count = 0
    for block in vit.blocks:
        assert isinstance(block, Block)
        if isinstance(block.adapter, QLoRAAdapter):
            for layer in (block.adapter.down_proj, block.adapter.up_proj):
                layer.base = _quantized(layer.base, block.adapter.quantize_bits)
                count += 1
    return count


def _quantized(linear: nn.Linear, bits: int) -> nn.Linear:
    """The same linear over packed codes, on the same device, its bias kept as it is."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        hint = "pip install 'tensorkeep[quant]'"
        raise TensorkeepError("quantising needs bitsandbytes", where="quantization", hint=hint) from error
    device, sizes = linear.weight.device, (linear.in_features, linear.out_features)
    packed: nn.Linear
    if bits == 4:
        packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4")
        packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        packed = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    packed.bias = linear.bias
    return packed.to(device)
