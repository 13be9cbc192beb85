"""One of two ranks: accelerate's own save and load under FSDP2 on CPUs, with the newest save damaged before the load.

`python -m tests.accelerate_fsdp FOLDER RANK` saves three times into FOLDER/own as accelerate does and into FOLDER/ours
as we do, breaks what rank 1 wrote of the newest, loads from both, and writes to FOLDER/came_RANK.json what came back.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tensorkeep
from tensorkeep.integrations.accelerate import load_state, save_state


def sharded(rank: int) -> tuple[Accelerator, nn.Module, AcceleratedOptimizer]:
    """A model and its optimizer as accelerate prepares them where it shards, which it does on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator._models.append(model)
    accelerator._optimizers.append(optimizer)
    return accelerator, model, optimizer


def weights(model: nn.Module) -> list[float]:
    return [number for p in model.parameters() for number in p.full_tensor().flatten().tolist()]


def main(folder: Path, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accelerator, model, optimizer = sharded(rank)
    guard, held, came = tensorkeep.guard(folder / "own"), {}, {"kind": accelerator.distributed_type.value}
    for step in (1, 2, 3):
        accelerator.backward(model(torch.ones(2, 8) * (rank + step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(str(folder / "own" / "checkpoints" / f"checkpoint_{step}"))
        dist.barrier()
        if rank == 0:
            guard.seal(f"checkpoints/checkpoint_{step}")
        save_state(accelerator, folder / "ours" / f"step_{step}", keep_last=2)
        held[step] = weights(model)
    if rank == 0:
        path = folder / "own/checkpoints/checkpoint_3/pytorch_model_fsdp_0/__1_0.distcp"
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 1
        path.write_bytes(blob)
        os.truncate(folder / "ours/step_3/optimizer_0/__1_0.distcp", 100)
    dist.barrier()
    for name in ("own", "ours"):
        for p in model.parameters():
            nn.init.zeros_(p)
        if name == "own":
            found = guard.resume_path()
            accelerator.load_state(found)
        else:
            found = load_state(accelerator, folder / "ours")
        came[name] = Path(found).name
        came[f"{name} is that step"] = weights(model) == held[int(came[name][-1])]
    (folder / f"came_{rank}.json").write_text(json.dumps(came))
    os._exit(0)  # what was saved is whole; gloo's threads abort some exits on a loaded machine


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
