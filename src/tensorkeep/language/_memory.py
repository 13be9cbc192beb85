"""How much memory a language run takes against time: what `training.memory` sets, in one place.

`least`: of each decoder layer its input and what attention took and gave wait in main memory, and gated MLPs compute
gate and up again; a frozen table of embeddings stays in main memory, too. `balanced`: the same, but three quarters of
the layers keep gate and up on the GPU. `most`: every layer keeps what its backward needs, and no product is computed
twice. `training.memory_limit_gib` plans between these (`_memory_plan`). In all of them gated MLPs run as one operation
(`_gated_mlp`), and frozen weights are held in the dtype of computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language import _documents
from tensorkeep.language._gated_layers import Fused, fuse_mlps
from tensorkeep.language._memory_plan import GIB, LONG, Little, Plan, Sizes, Way, main_memory, planned
from tensorkeep.language._recompute import Kept, lean
from tensorkeep.language.recipe import LanguageRecipe
from tensorkeep.models.language_model import text_config
from tensorkeep.quantization import float8
from tensorkeep.training.distributed import World
from tensorkeep.training.offload import Offload

Memory = Literal["least", "balanced", "most"]
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
    model: nn.Module, layers: Sequence[nn.Module], memory: Memory | Way, compiled: bool, tokens: int, alone: bool
) -> str:
    """Let a model's layers keep what the recipe's `memory` says.

    Args:
        model: of transformers, on its device; changed in place.
        layers: its decoder layers.
        memory: the recipe's word, or a planned way.
        compiled: whether layers run compiled; else a layer keeps its input alone or, where it keeps wide products, all.
        tokens: of a forward pass.
        alone: whether this is the only process; else embeddings stay on the GPU.

    Returns:
        What was chosen, for a person.
    """
    way = memory if isinstance(memory, Way) else _way(memory, len(layers), tokens)
    keep = [index >= len(layers) - way.wide for index in range(len(layers))]
    offload = None if way.little is None else Offload(way.host, way.every)
    # a whole layer that is computed again holds gate and up for its own backward alone: else they would be made thrice
    again = not compiled and tokens <= _SHORT
    fused = fuse_mlps(layers, [wide or again for wide in keep])
    little: Kept = (way.little or "queries") if compiled else "input"
    for layer, wide in zip(layers, keep):
        lean([layer], _kept(layer, wide, little, offload is None, compiled), compiled, offload)
    said = [f"memory {memory}: of {len(layers)} layers {way.wide} keep their wide products"]
    if offload is not None:
        said.append(f"what else a backward needs ({little}) waits in main memory")
    if way.rows and alone and _rows_on_host(model):
        said.append("so do the embeddings")
    if not fused:
        said.append("no gated MLP that runs as one operation")
    return f"{'; '.join(said)} ({MEASURED})"


def _way(memory: Memory, layers: int, tokens: int) -> Way:
    """What a word of the recipe means."""
    little: Little | None = None if memory == "most" else "queries" if tokens <= LONG else "attention"
    return Way(round(layers * _KEEPING[memory]), little, rows=memory == "least")


def refuse_limit(recipe: LanguageRecipe, world: World) -> None:
    """Refuse a limit of memory where what training takes is not known.

    Args:
        recipe: its `training.memory_limit_gib`, and what it needs beside.
        world: this process among its peers.

    Raises:
        TensorkeepError: the limit cannot be kept to by this run.
    """
    training, limit = recipe.training, recipe.training.memory_limit_gib
    if limit is None:
        return
    wrong = {
        "it is a limit of a GPU's memory, and the run is on a CPU": world.device.type != "cuda",
        "sharded training is not planned": training.parallel == "fsdp",
        "training without an adapter is not planned": recipe.adapter is None,
        "layers that are not compiled are not planned": not training.compile,
        "only bf16 is planned": training.precision != "bf16",
    }
    why = next((why for why, here in wrong.items() if here), None)
    if why:
        hint = "leave it out, or: --lora_r 16 --training.precision bf16 --training.compile true, on a GPU"
        raise TensorkeepError(why, where="training.memory_limit_gib", hint=hint)


def hold_to(limit: float, device: torch.device) -> None:
    """Let torch take no more than so many GiB of a GPU from here on.

    Args:
        limit: GiB.
        device: the GPU.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.empty_cache()  # what loading left
    whole = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit * GIB / whole, 1.0), index)


def fitted(
    model: nn.Module,
    layers: Sequence[nn.Module],
    samples: int,
    length: int,
    limit: float,
    alone: bool,
    averaged: bool = False,
) -> Plan:
    """Plan how a model trains within a number of GiB of its GPU.

    Args:
        model: of transformers, on its device, with its adapter.
        layers: its decoder layers; their MLPs are made one operation.
        samples: of a forward pass, at most.
        length: tokens of a sample.
        limit: GiB of the GPU.
        alone: whether this is the only process.
        averaged: whether an average of what trains is kept.

    Returns:
        The plan.

    Raises:
        TensorkeepError: it does not fit, or the layers are of a form whose memory was never measured.
    """
    if fuse_mlps(layers, [False] * len(layers)) < len(layers):
        what = "the memory of layers without a gated MLP over frozen linears is not known"
        hint = "memory: least, balanced or most, or gradient_checkpointing: true"
        raise TensorkeepError(what, where="training.memory_limit_gib", hint=hint)
    sizes, packed = _sizes(model, layers, alone, averaged), _documents.uses(model)
    return planned(sizes, samples, length, round(limit * GIB), main_memory(), packed)


def _sizes(model: Any, layers: Sequence[Any], alone: bool, averaged: bool) -> Sizes:
    """The sizes of a decoder."""
    config = text_config(model.config)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    training = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = model.get_input_embeddings()
    return Sizes(
        layers=len(layers),
        hidden=config.hidden_size,
        wide=max(layer.mlp.gate_proj.out_features for layer in layers),
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        weights=sum(t.nbytes for t in tensors.values()),
        table=table.weight.nbytes if alone and _can_wait(model, table) else 0,
        training=training * (4 if averaged else 3) * 4,
        float8=all(float8.ROLES[0] in layer.mlp.gate_proj._buffers for layer in layers),
    )


def _kept(layer: nn.Module, wide: bool, little: Kept, here: bool, compiled: bool) -> Kept:
    """What of a layer is kept; of a fused MLP its own setting says whether wide products are."""
    if not wide:
        return little
    if not compiled:
        return "all"
    if here or not isinstance(getattr(layer, "mlp", None), Fused):
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
    table = model.get_input_embeddings()
    if not _can_wait(model, table) or not table.weight.is_cuda:
        return False
    table.weight.data = table.weight.data.cpu()
    kind: Any = type(table)
    table.__class__ = _host_class(kind)
    return True


def _can_wait(model: Any, table: Any) -> bool:
    """Whether embeddings are frozen and the head does not share them."""
    head = model.get_output_embeddings()
    shared = head is not None and getattr(head, "weight", None) is table.weight
    return type(table) is nn.Embedding and not table.weight.requires_grad and table.max_norm is None and not shared
