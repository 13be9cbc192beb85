"""The two processes of test_quantize_ranks: they use quantized models, and rank 0 prints a result a line."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.adapters.lora import add_lora
from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.loading import load_quantized
from tensorkeep.quantization.modules import check_ranks, quantize_


def model(seed: int, kind: str = "nf4") -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).requires_grad_(False)
    quantize_(made, kind)  # type: ignore[arg-type]
    return made


def seeds_apart(rank: int) -> dict[str, Any]:
    """Two ranks that quantized different floats: found before; after DDP made them one, sound."""
    made = model(rank)
    try:
        if rank == 0:
            check_ranks(made, peers=False)  # waits for nobody
        check_ranks(made)
        found = ""
    except TensorkeepError as error:
        found = str(error)
    add_lora(made, ["0", "2"], r=4)
    wrapped = DistributedDataParallel(made)
    check_ranks(wrapped)
    torch.manual_seed(7 + rank)
    wrapped(torch.randn(3, 64)).sum().backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    one = torch.cat([g.flatten() for g in grads])
    both = [torch.empty_like(one) for _ in range(2)]
    dist.all_gather(both, one)
    return {"found": found, "grads": len(grads), "equal": bool(torch.equal(*both))}


def sharded() -> dict[str, Any]:
    """FSDP2 over LoRA on a quantized base: every key is in the state dict, and it loads into a fresh model."""
    made = model(0)
    add_lora(made, ["0", "2"], r=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    x = torch.randn(4, 64)
    whole, keys = made(x), set(made.state_dict())
    fully_shard(made)
    out = made(x)
    out.sum().backward()
    grads = sum(p.grad is not None for p in made.parameters())
    gathered: dict[str, Any] = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in made.state_dict().items()
    }
    distributed = get_model_state_dict(made)
    fresh = model(1, "fp4")
    add_lora(fresh, ["0", "2"], r=4)
    load_quantized(fresh, gathered)
    other = model(2)
    add_lora(other, ["0", "2"], r=4)
    fully_shard(other)
    set_model_state_dict(other, distributed)
    return {
        "forward": bool(torch.equal(out, whole)),
        "grads": grads,
        "keys": set(gathered) == keys,
        "dcp": set(distributed) == keys,
        "fresh": bool(torch.equal(fresh(x), whole)),
        "other": bool(torch.equal(other(x), whole)),
        "layers": sum(isinstance(m, QuantLinear) for m in other.modules()),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {"apart": seeds_apart(dist.get_rank()), "sharded": sharded()}
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    os._exit(0)  # taking a gloo group down ends some processes by a signal now and then: torch's own threads race
