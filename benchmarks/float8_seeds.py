"""Does training with fp8 products end where bf16 ends? The ordinary recipe on real text, seeds beside each other.

    python -m benchmarks.float8_seeds run --folder BASE --texts train.jsonl --held held.jsonl --seed 0 --out runs/bf16-0
    python -m benchmarks.float8_seeds run ... --seed 0 --compute fp8 --out runs/fp8-0
    python -m benchmarks.float8_seeds compare runs/bf16-0 runs/bf16-1 runs/bf16-2 runs/fp8-0

nf4 base, r 16 on every linear, bf16, AdamW, cosine. A seed draws the first updates and the order of the rows. A run is
a process and leaves `curve.json`; `compare` prints the loss in tenths of the run, the spread of the bf16 seeds, and how
far each fp8 run is from their mean and from the bf16 run of its own seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

TENTHS = 10


def train(given: argparse.Namespace) -> None:
    from tensorkeep.language.job import build, loop_of
    from tensorkeep.language.recipe_text import language_recipe
    from tensorkeep.training import metrics
    from tensorkeep.training.distributed import World
    from tensorkeep.training.loop import fit

    torch.set_num_threads(given.threads)
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    given.out.mkdir(parents=True)
    training: dict[str, Any] = {
        "updates": given.updates,
        "batch_size": given.rows,
        "precision": "bf16",
        "quantize_backbone": "nf4",
        "quantize_compute": given.compute,
        "memory": "most",
        "compile": given.compile,
        "seed": given.seed,
        "log_every": 1,
        "evaluate_every": max(given.updates // 5, 1),
    }
    document = {
        "version": 2,
        "model": str(given.folder),
        "objective": "pretrain",
        "data": {"files": str(given.texts), "length": given.length, "eos": False},
        "evaluation": {"files": [str(given.held)]},
        "adapter": {"lora_r": 16, "lora_alpha": 32},
        "optimizer": {"lr": given.lr},
        "schedule": {"warmup": 0.04},
        "training": training,
    }
    recipe = language_recipe(document)
    lines: list[str] = []
    job = build(recipe, given.out, world, lines.append)
    begun = time.perf_counter()
    ends: list[float] = []
    job.trackers.append(lambda row: ends.append(time.perf_counter()))
    fit(job, given.out, loop_of(recipe, len(job.data)), world=world)
    rows = list(metrics.rows(given.out / metrics.METRICS))
    found = {
        "compute": given.compute or "bf16",
        "seed": given.seed,
        "losses": [row["loss"] for row in rows if "loss" in row],
        "held_out": [row for row in rows if "evaluation" in row],
        "seconds": round(time.perf_counter() - begun, 1),
        "said": lines,
    }
    (given.out / "curve.json").write_text(json.dumps(found))
    print(json.dumps({k: found[k] for k in ("compute", "seed", "seconds", "held_out")}), flush=True)


def compare(runs: list[Path]) -> None:
    curves = [json.loads((run / "curve.json").read_text()) for run in runs]
    plain = [c for c in curves if c["compute"] == "bf16"]

    def tenths(curve: dict[str, Any]) -> list[float]:
        losses, size = curve["losses"], max(len(curve["losses"]) // TENTHS, 1)
        return [statistics.mean(losses[at : at + size]) for at in range(0, size * TENTHS, size)]

    for curve in curves:
        print(f"{curve['compute']} seed {curve['seed']}: " + " ".join(f"{loss:.4f}" for loss in tenths(curve)))
        print(f"    held out: {[held(row) for row in curve['held_out']]}, {curve['seconds']} s")
    for curve in (c for c in curves if c["compute"] != "bf16"):
        own = next((c for c in plain if c["seed"] == curve["seed"]), None)
        last, others = held(curve["held_out"][-1]), [held(c["held_out"][-1]) for c in plain]
        mean = statistics.mean(others)
        print(
            f"fp8 seed {curve['seed']}: held out {last:.4f}, {last / mean - 1:+.3%} of the bf16 mean {mean:.4f}", end=""
        )
        print(f", bf16 from {min(others):.4f} to {max(others):.4f}")
        inside = [min(t) - 1e-9 <= x <= max(t) for x, *t in zip(tenths(curve), *map(tenths, plain))]
        print(f"    tenths of the curve within the bf16 seeds: {sum(inside)} of {len(inside)}")
        if own is not None:
            apart = [f"{a - b:+.4f}" for a, b in zip(tenths(curve), tenths(own))]
            print(
                f"    less bf16 of the same seed: {' '.join(apart)}, held out {last - held(own['held_out'][-1]):+.4f}"
            )


def held(row: dict[str, Any]) -> float:
    """The loss of an evaluation's row."""
    return float(row["evaluation"]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    for name in ("--folder", "--texts", "--held", "--out"):
        one.add_argument(name, type=Path, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--compute", choices=["fp8"])
    one.add_argument("--updates", type=int, default=500)
    one.add_argument("--rows", type=int, default=8)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--lr", type=float, default=2e-4)
    one.add_argument("--compile", action="store_true")
    one.add_argument("--threads", type=int, default=2)
    commands.add_parser("compare").add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    if given.command == "run":
        train(given)
    else:
        compare(given.runs)


if __name__ == "__main__":
    main()
