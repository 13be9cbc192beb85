"""All that is measured of QLoRA on a GPU, in one visit: tests, loading, limits of memory, packed rows, head to head.

    python -m benchmarks.qlora_device --folder /data/random-8b --out results --env unsloth=/envs/unsloth
    python -m benchmarks.qlora_device --folder /data/random-8b --only limit-12,limit-24

Each step is a process with a time of its own; what fails or is not over says so and the next one begins. The last line
that a step printed is kept in `--out`/qlora_device.json. The order is that of what is wanted first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

TESTS = ("documents", "memory_plan", "memory", "offload", "gated_mlp", "head_loss", "quantize_loading", "graphs")


def steps(folder: Path, out: Path, environments: list[str]) -> dict[str, tuple[list[str], int]]:
    """Name each step; its arguments after `python -m` and its seconds."""
    tests = [str(path) for name in TESTS for path in Path("tests").glob(f"test_{name}.py")]
    recipe = ["benchmarks.qlora_recipe", "--folder", str(folder)]
    rows = ["benchmarks.qlora_language", "--modes", "least", "--steps", "8", "--documents", "512", "--shapes", "4x2048"]
    load = ["benchmarks.quantize_load", "--size", "8b", "--folder", str(folder), "--only", "ours"]
    limit = {
        "limit-7.5": (["--limit", "7.5", "--updates", "6"], 120),
        "limit-7.5-again": (["--limit", "7.5", "--updates", "4"], 90),  # what cached code saves of the first update
        "limit-12": (["--limit", "12", "--length", "32768", "--document", "4096", "--updates", "4"], 150),
        "limit-24": (["--limit", "24", "--length", "131072", "--document", "8192", "--updates", "3"], 240),
    }
    long = ["--limit", "130", "--length", "524288", "--document", "32768", "--updates", "2"]
    heads = ["benchmarks.headtohead", "--folder", str(folder), "--out", str(out), "--timeout", "150"]
    return {
        "tests": (["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests], 240),
        **{name: ([*recipe, *more], seconds) for name, (more, seconds) in limit.items()},
        "packed": (rows, 120),
        "packed-mask": ([*rows, "--mask"], 120),
        "headtohead": ([*heads, *(x for text in environments for x in ("--env", text))], 1500),
        "load": (load, 60),
        "load-again": (load, 60),
        "limit-130": ([*recipe, *long], 500),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", help="names of steps, with commas")
    parser.add_argument("--env", action="append", default=[], metavar="SYSTEM=FOLDER")
    given = parser.parse_args()
    from benchmarks.qlora_recipe import prepare

    prepare(given.folder, "8b")
    found: dict[str, dict[str, str | float]] = {}
    every = steps(given.folder, given.out, given.env)
    for name in given.only.split(",") if given.only else every:
        arguments, seconds = every[name]
        begun = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=seconds)
            lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
            last = lines[-1] if lines else ""
            said = last if done.returncode == 0 else f"ended with {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            said = f"not over in {seconds} s"
        found[name] = {"seconds": round(time.perf_counter() - begun, 1), "said": said}
        print(f"{name}: {found[name]['seconds']} s: {said}", flush=True)
        (given.out / "qlora_device.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
