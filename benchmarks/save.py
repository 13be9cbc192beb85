"""Saving while a GPU trains: ours against torch.save, dcp.save and dcp.async_save (threads; pinned stager).

    PYTHONPATH=src python -m benchmarks.save [--states big lora] [--folder DIR] [--gigabytes 8.6] [--modes ...]

Needs torch, numpy, xxhash and safetensors; nothing is fetched. A step is about 200 ms of bf16 matrix products followed
by an in-place update of the whole state, as an optimizer does it. Each way runs in a process of its own: steps without
saves give the median step; then each save opens a window that ends with the first step after it is durable.

- *stall*: seconds the call held the loop, and any wait before the update that follows it.
- *copy*: until the state was out of the way of training; *durable*: until the call, its future or its thread said done.
- *lost*: window - steps in it x median step: what the save cost training.

Two states: fp32 weights and moments in 64 MiB tensors, and a QLoRA-like one (1344 tensors, 0.5 GB). The last
checkpoint is read back and compared with what the state was at its step. Rows go to $OUT/save.json and save.md too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.save_cpu import raw_write

LORA_BYTES = 503_316_480
MODES = ("ours", "torch.save", "dcp.save", "dcp.async_save thread", "dcp.async_save pinned")
State = dict[str, dict[str, torch.Tensor]]


def big_state(gigabytes: float, device: str) -> State:
    """Weights and two moments, fp32, in tensors of 64 MiB."""
    count = max(1, round(gigabytes * 1e9 / 3 / (64 << 20)))
    shapes = {f"layers.{i}.weight": (4096, 4096) for i in range(count)}
    return _filled(shapes, device)


def lora_state(device: str) -> State:
    """Low-rank pairs of rank 16 on every linear layer of a Llama-shaped 8B model, and their moments: 0.5 GB, fp32."""
    kinds = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    kinds |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    shapes = {}
    for layer in range(32):
        for kind, (out, into) in kinds.items():
            shapes |= {f"layers.{layer}.{kind}.lora_A": (16, into), f"layers.{layer}.{kind}.lora_B": (out, 16)}
    return _filled(shapes, device)


def _filled(shapes: dict[str, tuple[int, ...]], device: str) -> State:
    """Make tensors that start at their own number; updates add one, so a value says at which step it was copied."""
    model = {n: torch.full(s, float(i), device=device) for i, (n, s) in enumerate(shapes.items())}
    moments = {
        f"{n}/{m}": torch.full(s, 0.0, device=device) for n, s in shapes.items() for m in ("exp_avg", "exp_avg_sq")
    }
    return {"model": model, "optimizer": moments}


class Training:
    """A training with steps of some 200 ms; `before_update` is called before the state changes."""

    def __init__(self, state: State, device: str) -> None:
        self.state, self.cuda, self.updates = state, device == "cuda", 0
        self.tensors = [t for part in state.values() for t in part.values()]
        size = 8192 if self.cuda else 256
        self.factors = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.products = 1
        if self.cuda:
            self.products = max(1, round(0.2 / max(min(self._timed() for _ in range(5)), 1e-5)))

    def _timed(self) -> float:
        started = time.perf_counter()
        self._compute(8)
        self._synchronize()
        return (time.perf_counter() - started) / 8

    def _compute(self, times: int) -> None:
        for _ in range(times):
            torch.matmul(*self.factors)

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def step(self, before_update: Callable[[], None] = lambda: None) -> float:
        started = time.perf_counter()
        self._compute(self.products)
        before_update()
        torch._foreach_add_(self.tensors, 1.0)
        self.updates += 1
        self._synchronize() if not self.cuda else torch.cuda.current_stream().synchronize()
        return time.perf_counter() - started


class Way:
    """A way of saving: `start` begins a save, `done` gives the seconds until it was durable."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.mode, self.folder, self.copy = mode, folder, 0.0
        self._saver: Any = None
        self._pending: Any = None
        self._staged: Any = None
        self._stager: Any = None
        self._finished: list[float] = []

    def start(self, state: State, step: int) -> None:
        self._started = time.perf_counter()
        self._finished = []
        getattr(self, "_" + self.mode.split()[-1].replace(".", "_"))(state, self.folder / f"{step}", step)

    def _ours(self, state: State, path: Path, step: int) -> None:
        from tensorkeep.training.saver import Keep, Saver, State

        self._saver = self._saver or Saver(self.folder, Keep(1), background=True)
        self._saver.save(State(state["model"], state["optimizer"], {}, {"step": step}))

    def _torch_save(self, state: State, path: Path, step: int) -> None:
        torch.save(state, path)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        self._over()

    def _dcp_save(self, state: State, path: Path, step: int) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, save

        save(state, storage_writer=FileSystemWriter(path, thread_count=4), no_dist=True)
        self._over()

    def _thread(self, state: State, path: Path, step: int) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        self._pending = async_save(state, storage_writer=FileSystemWriter(path, thread_count=4), no_dist=True)
        self._pending.add_done_callback(lambda _: self._over())
        self.copy = time.perf_counter() - self._started

    def _pinned(self, state: State, path: Path, step: int) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=cuda
        )
        self._stager = self._stager or DefaultStager(options)
        writer = FileSystemWriter(path, thread_count=4)
        answer = async_save(state, storage_writer=writer, async_stager=self._stager, no_dist=True)
        self._staged, self._pending = answer.staging_completion, answer.upload_completion
        self._pending.add_done_callback(lambda _: self._over())

    def _over(self) -> None:
        self._finished.append(time.perf_counter() - self._started)

    def before_update(self) -> None:
        if self._saver is not None:
            self._saver.before_step()
        if self._staged is not None:
            self._staged.result()
            self.copy = time.perf_counter() - self._started
            self._staged = None

    def done(self) -> float | None:
        if self._saver is not None:
            if self._saver.flying:
                return None
            self._saver.wait()
            self.copy = self._saver.copies[-1]
            return float(self._saver.durations[-1])
        if self._pending is not None:
            if not self._pending.done():
                return None
            self._pending.result()
        return self._finished[0] if self._finished else None

    def clear(self, step: int) -> None:
        """Delete a checkpoint of a way that does not prune by itself."""
        path = self.folder / f"{step}"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def measure(mode: str, which: str, folder: Path, gigabytes: float, saves: int, device: str) -> dict[str, Any]:
    state = lora_state(device) if which == "lora" else big_state(gigabytes, device)
    training, way = Training(state, device), Way(mode, folder)
    for _ in range(3):
        training.step()
    median = statistics.median(training.step() for _ in range(12))
    row: dict[str, Any] = {"mode": mode, "state": which, "median_step": median, "saves": []}
    row["bytes"] = sum(t.numel() * t.element_size() for t in training.tensors)
    for _ in range(saves):
        at = training.updates
        started = time.perf_counter()
        way.start(state, at)
        held = time.perf_counter() - started
        slowest, steps, durable = 0.0, 0, way.done()
        while durable is None or steps < 5:
            slowest, steps = max(slowest, training.step(way.before_update)), steps + 1
            durable = durable if durable is not None else way.done()
        window = time.perf_counter() - started
        row["saves"].append(
            {
                "stall": held + max(0.0, slowest - median),
                "call": held,
                "copy": way.copy or held,
                "durable": durable,
                "lost": window - steps * median,
                "steps": steps,
            }
        )
        if mode != "ours":
            way.clear(at)
    if mode == "ours":
        row["right"] = read_back(folder, at)
    return row


def read_back(folder: Path, step: int) -> bool:
    """Check that the newest checkpoint is whole and holds every tensor as it was at this step."""
    from tensorkeep.training.saver import newest

    found = newest(folder)
    assert found is not None
    state = found[0]
    values = [(float(i + step), t) for i, t in enumerate(state.model[n] for n in _in_order(state.model))]
    values += [(float(step), t) for t in state.optimizer.values()]
    return state.document["step"] == step and all(bool((t == v).all()) for v, t in values)


def _in_order(model: dict[str, torch.Tensor]) -> list[str]:
    """Sort names in the order in which they were numbered, which their first elements say."""
    return sorted(model, key=lambda n: float(model[n].flatten()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8.6)
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    parser.add_argument("--states", nargs="*", default=["big", "lora"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        saves = 3 if given.one == "ours" or given.states[0] == "lora" else 2
        print(json.dumps(measure(given.one, given.states[0], given.folder, given.gigabytes, saves, given.device)))
        return
    rows: list[dict[str, Any]] = []
    for which in given.states:
        size = round(given.gigabytes * 1e9) if which == "big" else LORA_BYTES
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            raw = [raw_write(Path(folder) / "raw", size) for _ in range(2)]
        for mode in given.modes:
            rows.append({**in_process(mode, which, given), "raw": raw})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            write(rows)
    print(table(rows))


def in_process(mode: str, which: str, given: argparse.Namespace) -> dict[str, Any]:
    """One way and one state in a process of their own."""
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        command = [sys.executable, "-m", "benchmarks.save", "--one", mode, "--states", which, "--folder", folder]
        command += ["--gigabytes", str(given.gigabytes), "--device", given.device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"mode": mode, "state": which, "error": done.stderr.strip().splitlines()[-1]}
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}", ""]
    lines += [
        "| state | way | save | stall s | copy s | durable s | x raw write | lost s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['state']} | {row['mode']} | - | {row['error'][:120]} | | | | |")
        for number, save in enumerate(row.get("saves", []), 1):
            times = save["durable"] / min(row["raw"])
            seconds = f"{save['stall']:.3f} | {save['copy']:.2f} | {save['durable']:.2f}"
            lines.append(
                f"| {row['state']} | {row['mode']} | {number} | {seconds} | {times:.2f} | {save['lost']:.2f} |"
            )
    for which in dict.fromkeys(row["state"] for row in rows):
        later = {
            r["mode"]: statistics.median(s["lost"] for s in r["saves"][1:])
            for r in rows
            if r["state"] == which and "saves" in r
        }
        dcp = [lost for mode, lost in later.items() if mode.startswith("dcp")]
        if "ours" in later and dcp:
            lines += [
                "",
                f"{which}: lost, ours / best DCP from the second save on: {later['ours']:.3f} / {min(dcp):.3f} s",
            ]
        wrong = [r["mode"] for r in rows if r["state"] == which and r.get("right") is False]
        lines += [f"{which}: WRONG bytes in {wrong}"] if wrong else []
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    if out := os.environ.get("OUT"):
        Path(out, "save.json").write_text(json.dumps(rows, indent=1))
        Path(out, "save.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
