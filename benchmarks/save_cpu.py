"""A durable save of a training state on the CPU: ours against writing the bytes raw, torch.save, safetensors and DCP.

    python -m benchmarks.save_cpu [--gigabytes 4.2] [--saves 4] [--folder DIR]

Every way runs in a process of its own and saves the same state (bf16 weights, two fp32 moments) several times, each
into a new place, the one before deleted; a raw write of as many bytes (direct I/O, 16 MiB, one thread, fsync) is timed
before each save. *First* is the first save of the process, *median* that of the others. Ours is acknowledged: every
file and folder fsynced, every byte digested, renamed. The others get an fsync of their files, as generously as their
interface allows; DCP's own `.metadata` fsync happens before it is flushed, which counts here as if it were one.
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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, versions

MODES = ("ours", "torch.save", "safetensors", "dcp 1", "dcp 2", "dcp 4")


def make_state(gigabytes: float) -> dict[str, dict[str, Any]]:
    """bf16 weights and fp32 moments, 10 bytes a parameter, in matrices of 16.8 M and vectors of 4096."""
    import torch

    side = 4096
    count = max(1, round(gigabytes * 1e9 / 10 / (side * side + side)))
    model = {}
    optimizer = {}
    for layer in range(count):
        for name, shape in ((f"layers.{layer}.weight", (side, side)), (f"layers.{layer}.norm", (side,))):
            model[name] = torch.rand(shape).to(torch.bfloat16)
            optimizer |= {f"{name}/{slot}": torch.rand(shape) for slot in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "optimizer": optimizer}


def raw_write(path: Path, size: int) -> float:
    """Seconds to write and fsync `size` bytes with direct I/O, one thread, 16 MiB at a time."""
    from tensorkeep.storage import durable

    block = durable.allocate(durable.CHUNK)
    block[:] = os.urandom(1 << 16) * (len(block) >> 16)
    started = time.perf_counter()
    handle = durable.open_handle(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, direct=True)
    for start in range(0, size, len(block)):
        os.pwrite(handle, block, start)
    os.fsync(handle)
    os.close(handle)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def saver(mode: str, folder: Path, state: dict[str, dict[str, Any]]) -> Callable[[int], None]:
    """How to save step `n` durably in this way."""
    import torch

    def sync(path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    if mode == "ours":
        from tensorkeep.training.saver import Keep, Saver, State

        ours = Saver(folder, Keep(2), background=False)
        return lambda n: ours.save(State(state["model"], state["optimizer"], {}, {"step": n}))
    if mode == "torch.save":

        def with_torch(n: int) -> None:
            torch.save(state, folder / "new.pt")
            sync(folder / "new.pt")
            (folder / "new.pt").rename(folder / f"{n}.pt")

        return with_torch
    if mode == "safetensors":
        from safetensors.torch import save_file

        def with_safetensors(n: int) -> None:
            (folder / str(n)).mkdir()
            for part, tensors in state.items():
                save_file(tensors, folder / str(n) / f"{part}.safetensors")
                sync(folder / str(n) / f"{part}.safetensors")

        return with_safetensors
    from torch.distributed.checkpoint import FileSystemWriter, save

    threads = int(mode.split()[1])
    return lambda n: save(
        state, storage_writer=FileSystemWriter(folder / str(n), thread_count=threads, sync_files=True), no_dist=True
    )


class Peak:
    """The largest anonymous memory of this process while the body runs, over what it was."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous(os.getpid())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, anonymous(os.getpid()))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(mode: str, folder: Path, gigabytes: float, saves: int) -> dict[str, Any]:
    """Seconds of each save and of the raw write before it; the memory a save takes on top."""
    import torch

    state = make_state(gigabytes)
    size = sum(t.numel() * t.element_size() for part in state.values() for t in part.values())
    save = saver(mode, folder, state)
    seconds, raw, extra = [], [], []
    for n in range(1, saves + 1):
        raw.append(raw_write(folder / "raw", size))
        with Peak() as peak:
            started = time.perf_counter()
            save(n)
            seconds.append(time.perf_counter() - started)
        extra.append(peak.most - peak.start)
        for old in (folder / f"{n - 1}.pt", folder / str(n - 1)):
            old.unlink(missing_ok=True) if old.suffix else shutil.rmtree(old, ignore_errors=True)
    return {
        "mode": mode,
        "bytes": size,
        "seconds": seconds,
        "raw": raw,
        "extra": max(extra),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(MODES))
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.mode:
        print(json.dumps(measure(given.mode, given.folder, given.gigabytes, given.saves)))
        return
    rows = []
    for mode in given.only:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            command = [sys.executable, "-m", "benchmarks.save_cpu", "--mode", mode, "--folder", folder]
            command += ["--gigabytes", str(given.gigabytes), "--saves", str(given.saves)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr)
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{versions('torch', 'safetensors')}; {rows[0]['bytes'] / 1e9:.2f} GB")
    raw = statistics.median(second for row in rows for second in row["raw"])
    print(f"raw direct write, median of all: {raw:.2f} s")
    print("| way | first s | median s | x raw beside it | extra memory MB |\n|---|---|---|---|---|")
    for row in rows:
        middle, beside = statistics.median(row["seconds"][1:]), statistics.median(row["raw"])
        first, extra = row["seconds"][0], row["extra"] / 1e6
        print(f"| {row['mode']} | {first:.2f} | {middle:.2f} | {middle / beside:.2f} | {extra:.0f} |")
    ours = next((r for r in rows if r["mode"] == "ours"), None)
    dcp = [r for r in rows if r["mode"].startswith("dcp")]
    if ours and dcp:
        warm = min(statistics.median(r["seconds"][1:]) for r in dcp) / statistics.median(ours["seconds"][1:])
        cold = min(r["seconds"][0] for r in dcp) / ours["seconds"][0]
        print(f"best DCP / ours: {warm:.2f} warm, {cold:.2f} first")


if __name__ == "__main__":
    main()
