"""The floating types that a run computes in."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# in which shards are gathered, where that is not float32: fp16's scaler takes no mixture of shards and whole tensors
GATHERED = {"bf16": torch.bfloat16}


def autocast(loop: Loop, world: World) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which forwards are computed in the run's precision.

    Args:
        loop: its `precision` counts; with `fp32` the context does nothing.
        world: its device counts.
    """
    if loop.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(world.device.type, dtype=HALF_DTYPES[loop.precision])
