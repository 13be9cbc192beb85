"""Two ranks under FSDP2, one killed inside a save: `python examples/durable_dcp.py`.

The first save is whole. In the second a rank dies by SIGKILL while it writes: the folder still holds the first, which
one process reads back, and a flipped bit in it is found and its tensor named.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tensorkeep as tk


def train(rank: int, meeting: str, out: Path) -> None:
    """Make one update and save, make another and die in its save."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    write, step = os.pwrite, 0

    def dying(*args: object) -> int:
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return int(write(*args))

    os.pwrite = dying
    while step < 2:
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        state = {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, optimizer),
            "step": step,
        }
        dcp.save(state, storage_writer=tk.DurableWriter(out, timeout=5))
    dist.destroy_process_group()


def main() -> None:
    """Train, die, read back, damage."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "checkpoint"
        try:
            mp.spawn(train, (str(Path(place) / "meeting"), out), nprocs=2)
        except mp.ProcessExitedException as error:
            print(f"rank {error.error_index} died: {error.signal_name}")
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
        state = {"model": model.state_dict(), "step": 0}
        dcp.load(state, storage_reader=tk.DurableReader(out))
        print(f"read back on one process: step {state['step']}, every byte compared")

        copy = Path(shutil.copytree(out, Path(place) / "copy"))
        file = copy / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        findings, _, _ = tk.verify(copy)
        print(f"one bit flipped: {findings[0].code} {', '.join(findings[0].tensors)}")


if __name__ == "__main__":
    main()
