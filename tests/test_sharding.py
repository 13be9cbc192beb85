"""FSDP: the same numbers as DDP to rounding, the same files, and any number of processes goes on from them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint  # slow to load: once here, and not in each forked rank
from safetensors.torch import save_file
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import fsdp
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tests.gpu import needs_gpus
from tests.training import Died, assert_same_run, dying, ranks, relative_l2, small_job

LOOP = Loop(updates=8, batch=5, micro=1, log_every=1, save_every=2, evaluate_every=4, parallel="fsdp")


def train(
    run: Path,
    size: int,
    loop: Loop = LOOP,
    until: int | None = None,
    death: int = 0,
    dropout: float = 0.0,
    device: str = "cpu",
) -> None:
    def work(world: World) -> None:
        torch.manual_seed(77 + world.rank)
        used = loop if until is None else replace(loop, updates=until)
        job = dying(small_job(dropout=dropout, evaluate=True, device=str(world.device)), death)
        try:
            fit(job, run, used, world=world, allow=("updates",))
        except Died:
            assert death
        else:
            assert not death

    assert ranks(size, work, device) == [0] * size


@needs_gpus(2)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_two_gpus_too(parallel: str, tmp_path: Path) -> None:
    """In a process that has not looked at a device: one that has cannot fork others that use one."""
    code = "import sys; from tests.test_sharding import on_two_gpus; on_two_gpus(*sys.argv[1:])"
    clean = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, parallel, str(tmp_path)], env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def on_two_gpus(parallel: Any, folder: str) -> None:
    loop, place = replace(LOOP, parallel=parallel, batch=6, deterministic=True), Path(folder)
    train(place / "alone", 1, replace(loop, updates=8), device="cuda")
    train(place / "whole", 2, loop, device="cuda")
    train(place / "parts", 2, loop, death=14, device="cuda")
    train(place / "parts", 2, loop, device="cuda")
    assert_same_run(place / "whole", place / "parts")
    assert relative_l2(place / "alone", place / "whole") < 1e-5


def test_a_sharded_run_is_the_replicated_run(tmp_path: Path) -> None:
    train(tmp_path / "ddp", 2, replace(LOOP, parallel="ddp"))
    train(tmp_path / "fsdp", 2)
    assert relative_l2(tmp_path / "ddp", tmp_path / "fsdp") < 1e-5
    one, other = (checkpoint.newest(tmp_path / name) for name in ("ddp", "fsdp"))
    assert one is not None and other is not None
    for part in ("model", "optimizer", "ema"):
        a, b = getattr(one[0], part), getattr(other[0], part)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}


def test_a_sharded_run_that_died_ends_bitwise_where_it_would_have(tmp_path: Path) -> None:
    train(tmp_path / "whole", 2, dropout=0.2)
    train(tmp_path / "parts", 2, death=14, dropout=0.2)
    train(tmp_path / "parts", 2, dropout=0.2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_shards_go_on_as_one_and_one_as_shards(tmp_path: Path) -> None:
    train(tmp_path / "alone", 1)
    for size, until in ((2, 2), (1, 4), (3, 6), (2, 8)):
        train(tmp_path / "elastic", size, until=until)
    assert relative_l2(tmp_path / "alone", tmp_path / "elastic") < 1e-5


def test_shards_are_filled_from_a_checkpoint_by_name(tmp_path: Path) -> None:
    """Weights, and a tensor of another name and dtype; what is missing or of another shape is refused at once."""
    torch.manual_seed(3)
    whole = {n: t.half() for n, t in small_job().model.state_dict().items()}
    save_file({**whole, "moment": torch.arange(256.0).view(16, 16)}, tmp_path / "model.safetensors")
    view = read(tmp_path / "model.safetensors")

    def work(world: World) -> None:
        model = small_job().model
        fsdp.shard_modules(model, fsdp.blocks(model), world)
        shards = {n: p.detach() for n, p in model.named_parameters()}
        moment = torch.zeros_like(shards["blocks.0.0.weight"], dtype=torch.float64)
        fsdp.read_into({**shards, "m": moment}, view, {"m": "moment"})
        assert all(torch.equal(p.full_tensor(), whole[n].float()) for n, p in shards.items())
        assert torch.equal(moment.full_tensor(), torch.arange(256.0, dtype=torch.float64).view(16, 16))
        for name, code in (("none", "K01"), ("leave.bias", "S01")):
            with pytest.raises(TensorkeepError, match=code):
                fsdp.read_into({**shards, "m": moment}, view, {"m": name})

    assert ranks(3, work) == [0] * 3


def test_blocks_are_the_outermost_repeated_ones() -> None:
    inner = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)])
    model = nn.ModuleDict({"layers": inner, "head": nn.Linear(2, 2)})
    assert sharding.blocks(model) == list(inner)
    assert sharding.blocks(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) == []


def test_an_optimizer_with_state_cannot_be_sharded() -> None:
    job: Job = small_job(ema=False)
    job.loss(job.model, job.collate([job.data.sample(0, torch.Generator())]), 1.0)["loss"].backward()
    job.optimizer.step()
    with pytest.raises(Exception, match="holds state"):
        sharding.shard(job.model, job.optimizer, {}, [], World())
