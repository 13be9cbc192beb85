"""What a sharded save holds a training for where tensors are many and small: CPU milliseconds of its thread, by stage.

    python -m benchmarks.save_stall
    PYTHONPATH=OLDER/src python -m benchmarks.save_stall           the same of another checkout
    python -m benchmarks.save_stall --device cuda                  two GPUs: milliseconds of the clock

LoRA over nf4 under FSDP2, two gloo ranks, in a Llama of 32 layers, 128 wide, so that bytes do not count: 1,792 tensors
of updates, moments and counters. Saves are written behind the training. Of the first rank the median of the saves after
the first, of three runs the least. Stages lie within each other as the table's indents say.
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
    distributed.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
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
            subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            runs.append(json.loads((folder / "stall.json").read_text()))
    print(f"| {'ms' if given.device == 'cuda' else 'CPU ms'} | |\n|---|---|")
    for stage in STAGES:
        print(f"| {stage} | {min(run.get(stage, 0.0) for run in runs):.0f} |")


if __name__ == "__main__":
    main()
