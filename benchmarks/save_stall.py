"""What a sharded save holds a training for where tensors are many and small: CPU milliseconds of its thread, by stage.

    python -m benchmarks.save_stall
    PYTHONPATH=OLDER/src python -m benchmarks.save_stall           the same of another checkout
    python -m benchmarks.save_stall --device cuda                  two GPUs: milliseconds of the clock
    python -m benchmarks.save_stall --copies                       one GPU: the copy of the same files off it

LoRA over nf4 under FSDP2, two gloo ranks, in a Llama of 32 layers, 128 wide, so that bytes do not count: 1,792 tensors
of updates, moments and counters. Saves are written behind the training. Of the first rank the median of the saves after
the first, of three runs the least. Stages lie within each other as the table's indents say. `--copies`: the ranks
train on the CPU; tensors like those of the first one's last save, but on a GPU, are staged eight times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale_life import made, recipe_of

LAYERS, WIDTH, UPDATES, RUNS = 32, 128, 8, 3
STAGES = {  # stage -> module and function
    "all": "loop:_save",
    "  waiting for the one before": "saver:Saver.wait",
    "  state": "_resume:snapshot",
    "    the model's tensors by name": "_resume:stored_tensors",
    "  plan, room, chunks": "_shard_plan:ShardPlan.part",
    "  copy": "_staging:Stage.copy",
}


def rank(folder: Path, device: str) -> None:
    """Train as one of the ranks; the first leaves `stall.json`."""
    import importlib

    from tensorkeep.language import job as building
    from tensorkeep.language.recipe_text import language_recipe
    from tensorkeep.training import distributed
    from tensorkeep.training._staging import Stage
    from tensorkeep.training.loop import fit

    spent: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter if device == "cuda" else time.thread_time

    def timed(stage: str, before: Any) -> Any:
        @wraps(before)
        def after(*args: Any, **kwargs: Any) -> Any:
            begun = clock()
            try:
                return before(*args, **kwargs)
            finally:
                spent[stage].append(1e3 * (clock() - begun))

        return after

    staged: list[Any] = []
    before = Stage.copy
    Stage.copy = lambda self, files, steady: (staged.append(files), before(self, files, steady))[1]
    for stage, place in STAGES.items():
        name, _, path = place.partition(":")
        owner: Any = importlib.import_module(f"tensorkeep.training.{name}")
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, timed(stage, getattr(owner, last)))
    document = recipe_of(folder, UPDATES, True)
    document["adapter"] = {"lora_r": 8, "targets": ["*_proj"]}
    document["training"] = {**document["training"], "quantize_backbone": "nf4"}
    del document["training"]["ema"]
    recipe, world = language_recipe(document), distributed.start(device)
    job = building.build(recipe, folder / "run", world)
    fit(job, folder / "run", building.loop_of(recipe, len(job.data)), world=world)
    if world.first:
        found = {stage: statistics.median(times[1:]) for stage, times in spent.items()}
        (folder / "stall.json").write_text(json.dumps(found))
        rows = [
            [[s.start, s.tensor, list(own[s.tensor].shape), str(own[s.tensor].dtype)] for s in layout.slots]
            for layout, own in staged[-1]
        ]
        (folder / "files.json").write_text(json.dumps(rows))
    distributed.stop()


def copies(folder: Path) -> None:
    """Stage tensors like those of the first rank's last save, from a GPU."""
    from tensorkeep.storage.layout import FileLayout, Fixed, Slot
    from tensorkeep.training._staging import Stage

    files = []
    for number, rows in enumerate(json.loads((folder / "files.json").read_text())):
        segments: list[Any] = []
        own, end = {}, 0
        for start, name, shape, dtype in rows:
            kind = getattr(torch, dtype.removeprefix("torch."))
            own[name] = torch.zeros(shape, dtype=kind, device="cuda" if shape else "cpu")  # counters are on the CPU
            segments += [Fixed(end, bytes(start - end)), Slot(start, own[name].nbytes, name)]
            end = start + own[name].nbytes
        files.append((FileLayout(str(number), segments), own))
    stage, times = Stage(), []
    for _ in range(8):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        staged = stage.copy(files, frozenset(name for _, own in files for name in own))
        held = time.perf_counter() - begun
        staged.wait()
        times.append((held, time.perf_counter() - begun))
    held, whole = (1e3 * statistics.median(column[1:]) for column in zip(*times))
    count = sum(t.is_cuda for _, own in files for t in own.values())
    print(f"{count} tensors on a GPU: the caller waits {held:.0f} ms, all is there after {whole:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--copies", action="store_true")
    given = parser.parse_args()
    if given.rank:
        return rank(given.rank, given.device)
    runs = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            made(folder, LAYERS, WIDTH)
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            words += ["-m", "benchmarks.save_stall", "--rank", name, "--device", given.device]
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(done.stderr)
            if given.copies:
                return copies(folder)
            runs.append(json.loads((folder / "stall.json").read_text()))
    print(f"| {'ms' if given.device == 'cuda' else 'CPU ms'} | |\n|---|---|")
    for stage in STAGES:
        print(f"| {stage} | {min(run.get(stage, 0.0) for run in runs):.0f} |")


if __name__ == "__main__":
    main()
