"""4- and 8-bit weights: how they are described, encoded, run as layers and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.quantization.linear import QuantLinear as QuantLinear
    from tensorkeep.quantization.loading import load_quantizing as load_quantizing
    from tensorkeep.quantization.modules import quantize_ as quantize_
    from tensorkeep.quantization.modules import quantized_layers as quantized_layers
    from tensorkeep.quantization.stored import QuantizedWeight as QuantizedWeight

_WHERE = {
    "QuantLinear": "linear",
    "QuantizedWeight": "stored",
    "load_quantizing": "loading",
    "quantized_layers": "modules",
    "quantize_": "modules",
}
__all__ = ["QuantLinear", "QuantizedWeight", "load_quantizing", "quantize_", "quantized_layers"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
