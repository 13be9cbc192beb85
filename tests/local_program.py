"""One rank of a small run that is started by torchrun: RUN UPDATES LOCAL REPLICAS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.training import distributed, preflight
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.sections import CheckpointConfig
from tests.training import small_job


def train(run: Path, updates: int, local: bool, replicas: int) -> int:
    """Train; 2 after an error, which is printed as the command prints it."""
    torch.set_num_threads(1)
    preflight._WAIT = 0.5
    where = CheckpointConfig(local, replicas if local else 0)
    loop = Loop(updates, 4, micro=1, log_every=1, save_every=2, parallel="fsdp", checkpoint=where)
    try:
        world = distributed.start("cpu")
        job = small_job(dropout=0.2)
        outcome = fit(job, run, loop, world=world, allow=("updates",), say=Output())
    except TensorkeepError as error:
        print(f"error: {error}", flush=True)
        return 2
    print(f"rank {world.rank}: {outcome.reason} at step {outcome.step}, {outcome.level}", flush=True)
    dist.barrier()
    return 0


if __name__ == "__main__":
    status = train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
