"""QLoRA of an 8B's shape, system beside system: tokens/s, memory, first step and loading of each, in one command.

    python -m benchmarks.headtohead --folder /data/random-8b --env unsloth=/envs/unsloth --env peft=/envs/peft
    python -m benchmarks.headtohead --folder /data/tiny --size tiny --shapes 2x64 --systems tensorkeep,peft

Ours (`training.memory`), unsloth, PEFT + bitsandbytes, the same with Liger's kernels, axolotl: each way of each system
is a process of its own (`benchmarks.headtohead_systems`), in its own environment: `--env SYSTEM=FOLDER` is put in front
of the path of that system's processes (`pip install --no-deps --target FOLDER -r` that of `benchmarks/envs`); several
folders with a colon between them, so that systems share what both need.
All load the same folder of random bfloat16 weights, written once, and train on the same tokens from the same start.
What is not installed, fails or is not over in time has a row that says so. With `--together` the processes load and
compile at the same time and take turns for the steps that are timed, so that all of it takes minutes less; loading and
first steps are then those of a busy machine, and what all of them hold must fit on the GPU. Who is not ready after half
of `--timeout` is not waited for: the others begin, and a row names (`beside`) who still loaded or compiled meanwhile.

Writes headtohead.json and headtohead.svg (memory x speed, a line a system) into `--out`, and prints a table. The share
of the floor counts matrix work alone, with recomputation: see `benchmarks.qlora_language`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.headtohead_systems import WAYS
from benchmarks.qlora_language import floor_seconds
from benchmarks.qlora_recipe import prepare
from benchmarks.quantize_load import SHAPES

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def call(
    system: str, way: str, folder: Path, shape: str, steps: tuple[int, int], environments: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of one way of one system."""
    own = environments.get(system)
    path = os.pathsep.join(part for part in (own, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "benchmarks.headtohead_systems", "--system", system, "--way", way]
    counts = ["--steps", str(steps[0]), "--untimed", str(steps[1])]
    return [*command, "--folder", str(folder), "--shape", shape, *counts], os.environ | {"PYTHONPATH": path}


def row_of(row: dict[str, Any], out: str, err: str, code: int, seconds: float) -> dict[str, Any]:
    """The row that a process printed, or why there is none."""
    lines = [line for line in out.splitlines() if line.startswith('{"system"')]
    if not lines:
        return row | {"not_run": f"ended with {code}: {err.strip()[-300:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"process_s": round(seconds, 1)}


def one(
    system: str,
    way: str,
    folder: Path,
    shape: str,
    steps: tuple[int, int],
    environments: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Run one way of one system in a process of its own."""
    command, env = call(system, way, folder, shape, steps, environments)
    begun = time.perf_counter()
    row: dict[str, Any] = {"system": system, "way": way, "shape": shape}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return row | {"not_run": f"not over in {seconds:.0f} s"}
    return row_of(row, done.stdout, done.stderr, done.returncode, time.perf_counter() - begun)


def together(
    ways: Sequence[tuple[str, str]],
    folder: Path,
    shape: str,
    steps: tuple[int, int],
    environments: dict[str, str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Run several ways: all load and compile at the same time, then each times its steps alone."""
    begun = time.perf_counter()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as held, contextlib.ExitStack() as files:
        turns, waiting, running = Path(held), True, {}
        lock = files.enter_context((turns / "turn").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        for system, way in ways:
            command, env = call(system, way, folder, shape, steps, environments)
            said = [files.enter_context((turns / f"{system}-{way}.{n}").open("w")) for n in ("out", "err")]
            running[system, way] = subprocess.Popen(
                [*command, "--turns", held], env=env, stdout=said[0], stderr=said[1]
            )
        while len(rows) < len(running):
            seconds_so_far = time.perf_counter() - begun
            over = [way for way, process in running.items() if way not in rows and process.poll() is not None]
            busy = [w for w in running if w not in rows and not (turns / f"{w[0]}-{w[1]}.ready").exists()]
            for way in running if seconds_so_far > seconds else over:
                if way not in rows:
                    row = ended(turns, way, shape, running[way], seconds_so_far)
                    beside = [":".join(w) for w in busy if w not in over]
                    rows[way] = row | ({"beside": beside} if beside and "not_run" not in row else {})
            if waiting and (not set(busy) - set(over) or seconds_so_far > seconds / 2):
                fcntl.flock(lock, fcntl.LOCK_UN)
                waiting = False
            time.sleep(0.2)
    return [rows[way] for way in ways]


def ended(turns: Path, way: tuple[str, str], shape: str, process: subprocess.Popen[bytes], so_far: float) -> Any:
    """The row of a process that ended, or is ended here because its time is over."""
    row: dict[str, Any] = {"system": way[0], "way": way[1], "shape": shape}
    late = process.poll() is None
    process.kill()
    process.wait()
    out, err = ((turns / f"{way[0]}-{way[1]}.{n}").read_text(errors="replace") for n in ("out", "err"))
    if late:
        return row | {"not_run": f"not over in {so_far:.0f} s", "said": (out[-1000:] + err[-3000:]).strip()}
    return row_of(row, out, err, process.returncode, so_far)


def floor_of(folder: Path, shape: str) -> float:
    """Tokens/s of matrix work alone."""
    config = json.loads((folder / "config.json").read_text())
    batch, length = map(int, shape.split("x"))
    return batch * length / floor_seconds(config, batch, length)


def apart(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row how far its losses are from those of the first row of its shape."""
    for row in rows:
        first = next((r for r in rows if r["shape"] == row["shape"] and "losses" in r), None)
        if first is not None and "losses" in row:
            row["losses_apart"] = round(max(abs(a - b) for a, b in zip(row["losses"], first["losses"])), 4)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [
        "| tokens | system | way | tokens/s | peak GiB | held GiB | of the floor | load s | first step s "
        "| losses apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = f" (beside {', '.join(row['beside'])})" if "beside" in row else ""
        begin = f"| {row['shape']} | {row['system']} | {row['way']}{beside} |"
        if "not_run" in row:
            lines.append(f"{begin} not run: {row['not_run'].replace('|', '/')} |" + " |" * 6)
            continue
        memory = ["-" if row[k] is None else f"{row[k]:.2f}" for k in ("peak_gib", "held_gib")]
        lines.append(
            f"{begin} {row['tokens_per_s']:,.0f} | {memory[0]} | {memory[1]} | {row['of_floor']:.0%} | "
            f"{row['load_s']:.1f} | {row['first_step_s']:.1f} | {row['losses_apart']:.4f} |"
        )
    return "\n".join(lines)


def picture(rows: Sequence[dict[str, Any]], shape: str) -> str:
    """Memory x speed of one shape, a line a system, as SVG."""
    points = [r for r in rows if r["shape"] == shape and r.get("peak_gib") is not None and "not_run" not in r]
    width, height, left, low = 760, 460, 70, 50
    most_x = max((r["peak_gib"] for r in points), default=1.0) * 1.12
    most_y = max((r["tokens_per_s"] for r in points), default=1.0) * 1.12
    x = lambda gib: left + gib / most_x * (width - left - 20)  # noqa: E731
    y = lambda rate: height - low - rate / most_y * (height - low - 40)  # noqa: E731
    title, box = f"QLoRA of an 8B, r 16, {escape(shape)} tokens: speed and peak memory", f"0 0 {width} {height}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{title}</text>',
        f'<path d="M{left} 40V{height - low}H{width - 20}" fill="none" stroke="black"/>',
        f'<text x="{width / 2:.0f}" y="{height - 12}">GiB of the GPU, allocated at most</text>',
        f'<text x="16" y="{height / 2:.0f}" transform="rotate(-90 16 {height / 2:.0f})">tokens/s</text>',
    ]
    for step in range(1, 6):
        gib, rate = most_x * step / 5, most_y * step / 5
        parts.append(f'<text x="{x(gib) - 8:.0f}" y="{height - low + 16}">{gib:.0f}</text>')
        parts.append(f'<text x="{left - 50}" y="{y(rate) + 4:.0f}">{rate:,.0f}</text>')
    systems = list(dict.fromkeys(r["system"] for r in points))
    for number, system in enumerate(systems):
        colour = COLOURS[number % len(COLOURS)]
        own = sorted((r for r in points if r["system"] == system), key=lambda r: r["peak_gib"])
        line = " ".join(f"{x(r['peak_gib']):.1f},{y(r['tokens_per_s']):.1f}" for r in own)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for r in own:
            at = x(r["peak_gib"]), y(r["tokens_per_s"])
            parts.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{colour}"/>')
            parts.append(f'<text x="{at[0] + 6:.1f}" y="{at[1] - 6:.1f}" fill="{colour}">{escape(r["way"])}</text>')
        parts.append(
            f'<text x="{width - 150}" y="{height - low - 16 - 16 * number}" fill="{colour}">{escape(system)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--systems", default=",".join(WAYS), help="which, or SYSTEM:WAY")
    parser.add_argument("--shapes", default="4x2048")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--untimed", type=int, default=2, help="of the steps, the first ones, which compile")
    parser.add_argument("--env", action="append", default=[], metavar="SYSTEM=FOLDER")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one process, or of all together")
    parser.add_argument("--together", action="store_true", help="load and compile at the same time, time in turns")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    given = parser.parse_args()
    environments = dict(text.split("=", 1) for text in given.env)
    given.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    prepare(given.folder, given.size)
    print(f"weights: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for shape in given.shapes.split(","):
        floor = floor_of(given.folder, shape)
        parted = [name.partition(":") for name in given.systems.split(",")]
        ways = [(system, way) for system, _, only in parted for way in ([only] if only else WAYS[system])]
        how = (given.folder, shape, (given.steps, given.untimed), environments, given.timeout)
        for found in [together(ways, *how)] if given.together else ([one(*way, *how)] for way in ways):
            for row in found:
                if "tokens_per_s" in row:
                    row["of_floor"] = round(row["tokens_per_s"] / floor, 3)
                rows.append(row)
                print({k: v for k, v in row.items() if k not in ("versions", "said")}, file=sys.stderr, flush=True)
            (given.out / "headtohead.json").write_text(json.dumps(rows, indent=1))
    apart(rows)
    (given.out / "headtohead.json").write_text(json.dumps(rows, indent=1))
    for shape in given.shapes.split(","):
        name = "headtohead.svg" if "," not in given.shapes else f"headtohead-{shape}.svg"
        (given.out / name).write_text(picture(rows, shape))
    print(table(rows))


if __name__ == "__main__":
    main()
