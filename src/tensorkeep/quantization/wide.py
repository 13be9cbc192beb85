"""Say which weights of a quantized model stayed in floats, and how much of the parameters they are."""

from __future__ import annotations

from torch import nn

from tensorkeep.formats.names import grouped
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.replacing import clean_name
from tensorkeep.quantization.spreading import holds_codes
from tensorkeep.quantization.stacks import Stack

_SHOWN = 12


def stayed_wide(model: nn.Module) -> str | None:
    """Return a sentence about the frozen matrices that are still floats, embeddings included.

    Args:
        model: after `quantize_` or `load_quantizing`.

    Returns:
        The sentence, the largest first; None where nothing but norms, biases and what trains is left.
    """
    total = sum(p.numel() for p in model.parameters())
    packed = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            rows, columns = module.layout.shape
            held = sum(p.numel() for p in module.parameters(recurse=False) if holds_codes(p))
            total += rows * columns - held
            packed += rows * columns
        elif isinstance(module, Stack) and module.layout is not None:
            total += module.shape.numel()
            packed += module.shape.numel()
    wide = {
        clean_name(n).removesuffix(".base_layer"): p.numel()
        for n, p in model.named_parameters()
        if p.ndim > 1 and not holds_codes(p) and not p.requires_grad and ".lora_" not in n
    }
    kinds = grouped(sorted(wide, key=lambda n: -wide[n]))
    if not wide or not total:
        return None
    share = 100 * sum(wide.values()) / total
    shown = kinds[:_SHOWN]
    more = f" and {len(kinds) - len(shown)} more" if len(kinds) > len(shown) else ""
    return (
        f"{100 * packed / total:.0f} % of the parameters are quantized; {share:.0f} % stay in floats: "
        f"{', '.join(shown)}{more}"
    )
