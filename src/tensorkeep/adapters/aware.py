"""Train LoRA through the rounding of a 4-bit format: the forward sees the merged weight as a file will hold it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorkeep.adapters.lora import LoraConv1D, LoraLinear, LoraQuantLinear, LowRank, layers
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import matches
from tensorkeep.quantization.aware import ROW_BLOCK, Aware, Codes, aware_linear, rounded, summed
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.replacing import left_wide, tied_parameters


class AwareUpdate(LowRank):
    """What `make_aware` puts before a LoRA layer's class: base and update are one weight in 4 bits at every use."""

    aware: Aware
    aware_name: str

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer, `[..., in] -> [..., out]`, over the weight that a file will hold."""
        if self.merged is not None:
            return super().forward(x)
        return aware_linear(x, self, self.lora_A, self.lora_B, self.scale, self.aware, self.aware_name)

    @torch.no_grad()
    def codes(self) -> Codes:
        """Return the weight in codes, as the forward has it now."""
        return rounded(self.sum(), self.aware, self.aware_name)

    @torch.no_grad()
    def sum(self) -> Tensor:
        """Return base and update as one weight, before it is rounded: float32 [out, in]."""
        return summed(self, self.lora_A, self.lora_B, self.scale)

    def held_weight(self) -> Tensor:
        """Return the weight that the forward computes with, float32 [out, in]."""
        return self.codes().values()


class AwareLoraLinear(AwareUpdate, LoraLinear):
    """A dense linear whose merged weight is rounded at every use."""

    def over(self, base: QuantLinear) -> LoraQuantLinear:
        """Return a layer with the same update over a quantized form of this one."""
        made = super().over(base)
        _turn(made, self.aware, self.aware_name)
        return made


class AwareLoraQuantLinear(AwareUpdate, LoraQuantLinear):
    """A quantized linear whose merged weight is rounded at every use."""


def make_aware(model: nn.Module, kind: Aware) -> list[str]:
    """Let the LoRA layers of a model compute with their merged weight as a 4-bit file will hold it, in place.

    Args:
        model: with LoRA layers; names and parameters stay.
        kind: the format: "nf4" (bitsandbytes') or "q4_0" (GGUF's).

    Returns:
        The names of the layers.

    Raises:
        TensorkeepError: there are no LoRA layers, or the format cannot hold the merged weight of one: a head, an
            embedding or a tied weight, a Conv1D, rows that are no whole blocks; or the layer has dropout, for which
            there is no merged weight.

    Example:
        >>> from tensorkeep.adapters.lora import add_lora
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> _ = add_lora(model, ["0"], r=2)
        >>> make_aware(model, "nf4"), type(model[0]).__name__
        (['0'], 'AwareLoraLinear')
    """
    found = layers(model)
    if not found:
        raise TensorkeepError("the model has no LoRA layers", where="quantize_aware", hint="add_lora(model, targets)")
    wide, tied = left_wide(model), tied_parameters(model)
    for name, layer in found.items():
        why = None
        weight: Any = layer.weight
        if layer.dropout:
            why = f"has dropout {layer.dropout:g}, with which there is no merged weight"
        elif isinstance(layer, LoraConv1D) or getattr(layer, "inward", False):
            why = "keeps its matrix turned, which no 4-bit file does"
        elif matches(name, wide) or id(weight) in tied:
            why = "stays floats in 4-bit files: a head, an embedding, or tied to one"
        elif kind == "q4_0" and layer.in_features % ROW_BLOCK:
            why = f"has rows of {layer.in_features}, and q4_0 takes whole blocks of {ROW_BLOCK}"
        if why is not None:
            hint = "adapter.lora_dropout: 0" if layer.dropout else "leave it out of adapter.targets"
            raise TensorkeepError(f"{name} {why}", where="quantize_aware", hint=hint)
    for name, layer in found.items():
        _turn(layer, kind, name)
    return list(found)


def aware_layers(model: nn.Module) -> dict[str, AwareUpdate]:
    """Return the layers that compute with rounded merged weights, by name.

    Args:
        model: with such layers or without.
    """
    return {name: layer for name, layer in layers(model).items() if isinstance(layer, AwareUpdate)}


def _turn(layer: Any, kind: Aware, name: str) -> None:
    """Make one layer a subclass of itself."""
    layer.__class__ = AwareLoraQuantLinear if isinstance(layer, QuantLinear) else AwareLoraLinear
    layer.aware, layer.aware_name = kind, name
