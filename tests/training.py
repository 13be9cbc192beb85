"""A small job with everything that can go wrong in a resume, and ways to stop it, start it again and compare.

The job has dropout, random augmentation, a frozen part and an average.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tensorkeep.storage import run_manifest
from tensorkeep.storage.manifest_entries import ShardEntry
from tensorkeep.training import distributed, metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import Outcome, fit
from tests.run_states import equal


class Noisy:
    """Rows of a fixed table, each with noise of its own in every epoch."""

    def __init__(self, length: int = 23, width: int = 6) -> None:
        self.x = torch.randn(length, width, generator=torch.Generator().manual_seed(1))
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        noise = 0.1 * torch.randn(self.x.shape[1], generator=generator)
        return {"x": self.x[index] + noise, "y": self.y[index], "index": index}

    def fingerprint(self) -> str:
        return f"noisy {len(self)}"


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "x": torch.stack([s["x"] for s in samples]),
        "y": torch.stack([s["y"] for s in samples]),
        "index": [s["index"] for s in samples],
    }


def squared_error(model: nn.Module, batch: dict[str, Any], divisor: float) -> dict[str, Tensor]:
    return {"loss": (model(batch["x"]).float() - batch["y"]).square().sum() / divisor}


def rows_of(batch: dict[str, Any]) -> float:
    return len(batch["index"])


def linear_warmup(update: int, base: float) -> float:
    return base * min(1.0, (update + 1) / 10)


class Net(nn.Module):
    """A frozen way in, two equal blocks with dropout, a way out."""

    def __init__(self, dropout: float, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(6, width).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.leave = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, 6] -> [B, 1]."""
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def small_job(
    dropout: float = 0.2, ema: bool = True, seed: int = 0, evaluate: bool = False, device: str = "cpu", **fields: Any
) -> Job:
    """A small net on noisy rows; `dropout` draws from the process's generator, the noise from each sample's."""
    torch.manual_seed(seed)
    model = Net(dropout).to(device)
    data = Noisy()

    def error(model: nn.Module) -> dict[str, float]:
        torch.rand(3)  # an evaluation that draws must not change the run
        return {"error": float((model(data.x.to(device)) - data.y.to(device)).square().mean())}

    return Job(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),
        data=data,
        collate=collate,
        loss=squared_error,
        count=rows_of,
        schedule=linear_warmup,
        evaluate=error if evaluate else None,
        ema=Ema(model, decay=0.9) if ema else None,
        recipe={"training": {"lr": 1e-2, "dropout": dropout}},
        **fields,
    )


# -- dying and going on -----------------------------------------------------------------------------------------------


class Died(BaseException):
    """Stands for a kill: nothing between the update and the test may catch it."""


def dying(job: Job, at: int) -> Job:
    """Make the job die in its `at`-th forward (from 1)."""
    calls = 0

    def loss(model: nn.Module, batch: Any, divisor: float) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Died
        return dict(job.loss(model, batch, divisor))

    return replace(job, loss=loss)


def lived(make: Any, run: Path, loop: Loop, deaths: Sequence[int] = (), workers: Sequence[int] = ()) -> Outcome:
    """Train to the end, dying once in each start but the last; the random generators differ in every start."""
    for number, death in enumerate((*deaths, 0)):
        torch.manual_seed(1000 + number)
        used = replace(loop, workers=workers[number % len(workers)]) if workers else loop
        try:
            return fit(dying(make(), death), run, used)
        except Died:
            continue
    raise AssertionError("it never came to the end")


def rows(run: Path) -> list[dict[str, Any]]:
    """Read the rows of a run, without times and memory."""
    return metrics.comparable(run / metrics.METRICS)


def assert_same_run(one: Path, other: Path) -> None:
    """Newest checkpoints equal to the bit (weights, moments, average, random states, everything), and rows as well."""
    (a, _, _), (b, _, _) = (checkpoint.newest(run) or (None, None, None) for run in (one, other))
    assert a is not None and b is not None
    for part in ("model", "optimizer", "ema"):
        assert equal(getattr(a, part), getattr(b, part)), part
    assert a.document == b.document
    assert rows(one) == rows(other)
    assert checkpoint.best(one) == checkpoint.best(other)


def shards_of(folder: Path) -> dict[str, list[ShardEntry]]:
    """What lies in each file of a sharded checkpoint."""
    manifest = run_manifest.read_manifest(folder)
    found = {file: run_manifest.shards_in(folder, file, manifest) for file in manifest.files}
    return {file: own for file, own in found.items() if own}


# -- several processes ------------------------------------------------------------------------------------------------


def ranks(
    size: int, work: Callable[[World], None], device: str = "cpu", seconds: float = 120.0, patience: float = 1.0
) -> list[int]:
    """Run `work` in `size` forked processes that form a group; their exit statuses (0 well, 3 after an error).

    One that fails ends the others, as torchrun does, after `patience` seconds, in which they may say the same.
    """
    port = free_port()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, size, port, work, device)
        pids.append(pid)
    found: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(found) < size:
        for pid in (p for p in pids if p not in found):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        if any(found.values()) and end < math.inf:
            end = min(end, time.monotonic() + patience)
        if time.monotonic() > end:
            for pid in (p for p in pids if p not in found):
                os.kill(pid, signal.SIGKILL)
            end = math.inf
        time.sleep(0.005)
    return [found[pid] for pid in pids]


def _be_rank(rank: int, size: int, port: int, work: Callable[[World], None], device: str) -> NoReturn:
    torch.set_num_threads(1)  # the parent's pool of threads did not come along
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    status = 3
    try:
        work(distributed.start(device))
        distributed.stop()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def relative_l2(one: Path, other: Path) -> float:
    """Measure how far the weights of the newest checkpoints are apart."""
    a, b = (checkpoint.newest(run) for run in (one, other))
    assert a is not None and b is not None and set(a[0].model) == set(b[0].model)
    x, y = (torch.cat([t.double().flatten() for _, t in sorted(f[0].model.items())]) for f in (a, b))
    return float((x - y).norm() / x.norm())
