"""One of two ranks: accelerate's own loop under FSDP2 on CPUs, its `save_state` sealed in two ways, and a resume.

`python -m tests.accelerate_fsdp FOLDER RANK SAVES`: saves that many checkpoints, each as accelerate's own into
FOLDER/own and as ours into FOLDER/ours; with SAVES 0 it resumes from both and writes what came back.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tensorkeep
from tensorkeep.integrations.accelerate import load_state, save_state


def main(folder: Path, rank: int, saves: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{saves}", rank=rank, world_size=2)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate itself shards on accelerators only: what it would do there is done here, and its own save and load run
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator._models.append(model)
    accelerator._optimizers.append(optimizer)
    came: dict[str, object] = {}
    if not saves:
        own = tensorkeep.guard(folder / "own").resume_path()
        ours = load_state(accelerator, folder / "ours")
        accelerator.load_state(own)
        came = {"own": str(own), "ours": str(ours)}
    for step in range(1, saves + 1):
        accelerator.backward(model(torch.ones(2, 8) * (rank + step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(str(folder / "own" / "checkpoints" / f"checkpoint_{step}"))
        dist.barrier()
        if rank == 0:
            tensorkeep.guard(folder / "own").seal(f"checkpoints/checkpoint_{step}")
        save_state(accelerator, folder / "ours" / f"step_{step}", keep_last=2)
        came[str(step)] = sum(p.full_tensor().double().sum().item() for p in model.parameters())
    if not saves:
        came["sum"] = sum(p.full_tensor().double().sum().item() for p in model.parameters())
    came["kind"] = str(accelerator.distributed_type)
    (folder / f"came_{saves}_{rank}.json").write_text(json.dumps(came))
    os._exit(0)  # what was saved is whole; gloo's threads abort some exits on a loaded machine


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
