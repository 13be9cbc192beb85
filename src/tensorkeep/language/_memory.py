"""How much memory a language run takes against time: what `training.memory` sets, in one place.

`least`: of each decoder layer its input and what attention took and gave wait in main memory, and gated MLPs compute
gate and up again; a frozen table of embeddings stays in main memory, too. `balanced`: the same, but three quarters of
the layers keep gate and up on the GPU. `most`: every layer keeps what its backward needs, and no product is computed
twice. In all three gated MLPs run as one operation (`_gated_mlp`), and frozen weights are held in the dtype of
computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensorkeep.language._gated_layers import Fused, fuse_mlps
from tensorkeep.language._recompute import Kept, lean
from tensorkeep.training.offload import Offload

Memory = Literal["least", "balanced", "most"]
_LONG = 65536  # tokens from which main memory holds less of each layer
_SHORT = 16384  # tokens up to which gate and up of one layer may be whole on the GPU
# what the words cost and gave: benchmarks/results/qlora.md
MEASURED = (
    "measured on a Llama-3.1-8B over nf4, compiled, 4 x 2048 tokens on an H200: least 13,200 tokens/s in 6.8 GiB, "
    "balanced 14,980 in 18.0, most 16,100 in 30.0"
)
_KEEPING = {"least": 0.0, "balanced": 0.75, "most": 1.0}  # share of the layers that keep wide products


def hold_frozen(model: nn.Module, precision: str) -> None:
    """Hold frozen float32 weights in bfloat16 where that is computed in: products round them to it anyway.

    Args:
        model: changed in place, where something in it is frozen.
        precision: the recipe's.
    """
    if precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)


def arrange(
    model: nn.Module, layers: Sequence[nn.Module], memory: Memory, compiled: bool, tokens: int, alone: bool
) -> str:
    """Let a model's layers keep what the recipe's `memory` says.

    Args:
        model: of transformers, on its device; changed in place.
        layers: its decoder layers.
        memory: the recipe's word.
        compiled: whether layers run compiled; else a layer keeps its input alone or, where it keeps wide products, all.
        tokens: of a forward pass.
        alone: whether this is the only process; else embeddings stay on the GPU.

    Returns:
        What was chosen, for a person.
    """
    count = round(len(layers) * _KEEPING[memory])
    keep = [index >= len(layers) - count for index in range(len(layers))]
    offload = None if memory == "most" else Offload()
    # a whole layer that is computed again holds gate and up for its own backward alone: else they would be made thrice
    again = not compiled and tokens <= _SHORT
    fused = fuse_mlps(layers, [wide or again for wide in keep])
    little: Kept = ("queries" if tokens <= _LONG else "attention") if compiled else "input"
    for layer, wide in zip(layers, keep):
        lean([layer], _kept(layer, wide, little, memory, compiled), compiled, offload)
    said = [f"memory {memory}: of {len(layers)} layers {count} keep their wide products"]
    if offload is not None:
        said.append(f"what else a backward needs ({little}) waits in main memory")
    if memory == "least" and alone and _rows_on_host(model):
        said.append("so do the embeddings")
    if not fused:
        said.append("no gated MLP that runs as one operation")
    return f"{'; '.join(said)} ({MEASURED})"


def _kept(layer: nn.Module, wide: bool, little: Kept, memory: Memory, compiled: bool) -> Kept:
    """What of a layer is kept; of a fused MLP its own setting says whether wide products are."""
    if not wide:
        return little
    if not compiled:
        return "all"
    if memory == "most" or not isinstance(getattr(layer, "mlp", None), Fused):
        return "products"  # all, but for what is cheaper to make again than to hold: dequantized weights, norms
    return little


class HostRows(nn.Module):
    """The class put over an embedding whose table is in main memory: rows are gathered there and copied to the GPU."""

    weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids` `[..., width]`, on their device."""
        if self.weight.device == ids.device:
            kind: Any = type(self).__bases__[1]
            return kind.forward(self, ids)  # type: ignore[no-any-return]
        wanted = ids.flatten().cpu()
        rows = torch.empty(len(wanted), self.weight.shape[1], dtype=self.weight.dtype, pin_memory=ids.is_cuda)
        torch.index_select(self.weight, 0, wanted, out=rows)
        return rows.to(ids.device, non_blocking=True).view(*ids.shape, -1)


@cache
def _host_class(kind: Any) -> Any:
    return type(f"Host{kind.__name__}", (HostRows, kind), {})


def _rows_on_host(model: Any) -> bool:
    """Move a frozen table of embeddings that the head does not share off the GPU; returns whether there is one."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(table) is nn.Embedding and not table.weight.requires_grad and table.max_norm is None
    shared = head is not None and getattr(head, "weight", None) is table.weight
    if not plain or shared or not table.weight.is_cuda:
        return False
    table.weight.data = table.weight.data.cpu()
    kind: Any = type(table)
    table.__class__ = _host_class(kind)
    return True
