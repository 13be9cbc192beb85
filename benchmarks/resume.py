"""Time a resume, from the call of `fit` to the first forward, against reading the checkpoint's bytes.

    python -m benchmarks.resume [--gigabytes 1] [--times 5]

The model is made before the clock starts. Warm: the checkpoint is in the page cache; cold: it is pushed out before
every time. Reading: the same files through `read` into one buffer, and once more with the digests compared (`load`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import forget, remember, versions
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit


class Begun(Exception):
    """The first forward was reached."""


class Numbers:
    def __len__(self) -> int:
        return 64

    def sample(self, index: int, generator: torch.Generator) -> Tensor:
        return torch.full((8,), float(index))

    def fingerprint(self) -> str:
        return "numbers"


def job(gigabytes: float, stop: bool) -> Job:
    """Linears of 4 Mi weights each, whose weights and two moments come to so many gigabytes; one of them is used."""
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(max(1, round(gigabytes * 1e9 / 12 / 2048**2))))

    def loss(model: nn.Module, batch: Tensor, divisor: float) -> dict[str, Tensor]:
        if stop:
            raise Begun
        total = sum(((layer.weight * 1e-3).sum() for layer in model.children()), batch.sum() * 0.0)
        return {"loss": total / divisor}

    return Job(
        model=net,
        optimizer=torch.optim.AdamW(net.parameters()),
        data=Numbers(),
        collate=torch.stack,
        loss=loss,
        count=lambda batch: float(len(batch)),
        schedule=lambda update, base: base,
    )


def read(folder: Path) -> None:
    """Every byte once, into memory that is used again."""
    buffer = memoryview(bytearray(16 << 20))
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def resumed(run: Path, gigabytes: float) -> float:
    made = job(gigabytes, stop=True)
    started = time.perf_counter()
    try:
        fit(made, run, Loop(updates=2, batch=2, save_every=1), allow=("updates",))
    except Begun:
        return time.perf_counter() - started
    raise AssertionError("no forward")


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resume-") as temporary:
        run = Path(temporary) / "run"
        fit(job(options.gigabytes, stop=False), run, Loop(updates=1, batch=2))
        folder = run / "checkpoints/step-000001"
        size = sum(p.stat().st_size for p in folder.iterdir())
        print(f"{versions('torch')}; {size / 1e9:.2f} GB\n")
        print("| cache | read s | load s | resume s | resume / read |\n|---|---|---|---|---|")
        for name, prepare in (("warm", remember), ("cold", forget)):
            found: dict[str, list[float]] = {"read": [], "load": [], "resume": []}
            for _ in range(options.times):  # in turn, so that the machine's moods fall on all three
                prepare(folder)
                found["read"].append(timed(lambda: read(folder)))
                prepare(folder)
                found["load"].append(timed(lambda: checkpoint.load(folder)))
                prepare(folder)
                found["resume"].append(resumed(run, options.gigabytes))
            middle = {k: statistics.median(v) for k, v in found.items()}
            ratio = middle["resume"] / middle["read"]
            print(f"| {name} | {middle['read']:.2f} | {middle['load']:.2f} | {middle['resume']:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
