"""Reading a checkpoint back, every byte verified: ours against reading the bytes raw and against the peers' loads.

    python -m benchmarks.load [--gigabytes 4.2] [--rounds 3] [--folder DIR]

One state (bf16 weights, two fp32 moments) is written by each way; then, in a process of its own and with the files out
of the page cache, each loads it and touches every page. *raw* reads the same bytes with direct I/O, four threads, into
one buffer each; *raw, kept* reads them into as much memory as they fill, which is what a resume needs. The first step
after a resume is timed as well: `load`, then forward, backward and update of one layer on the loaded tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, forget, versions
from benchmarks.save_cpu import Peak, make_state, saver

WAYS = ("raw", "raw, kept", "ours", "ours, first step", "torch.load", "torch.load mmap", "safetensors", "dcp")


def write_all(folder: Path, gigabytes: float) -> None:
    """The state, once in each way's own files."""
    state = make_state(gigabytes)
    for mode, name in (("ours", "ours"), ("torch.save", "torch"), ("safetensors", "safetensors"), ("dcp 4", "dcp")):
        (folder / name).mkdir()
        saver(mode, folder / name, state)(1)


def raw(folder: Path, kept: bool) -> None:
    """Read every byte of our files with direct I/O in four threads."""
    from tensorkeep.storage import durable

    for path in sorted((folder / "ours/checkpoints/step-000001").glob("*.safetensors")):
        size = path.stat().st_size
        image = durable.allocate(size) if kept else None
        handle = durable.open_handle(path, os.O_RDONLY, direct=True)
        starts = iter(range(0, size, durable.CHUNK))
        lock = threading.Lock()

        def some(
            handle: int = handle, image: memoryview | None = image, starts: Any = starts, lock: Any = lock
        ) -> None:
            room = durable.allocate(durable.CHUNK)
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                os.preadv(handle, [room if image is None else image[start : start + durable.CHUNK]], start)

        threads = [threading.Thread(target=some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(handle)


def ours(folder: Path) -> Any:
    from tensorkeep.training.saver import newest

    found = newest(folder / "ours")
    assert found is not None
    return found[0]


def first_step(folder: Path) -> None:
    """Resume, and the first update of the first layer: the loaded tensors are the model's and the optimizer's."""
    import torch

    state = ours(folder)
    for name, value in state.model.items():
        weight = torch.nn.Parameter(value)
        if weight.dim() == 2:
            (weight @ torch.ones(weight.shape[-1], dtype=weight.dtype)).float().square().mean().backward()
            grad = weight.grad
            assert grad is not None
            moment = state.optimizer[f"{name}/exp_avg"].lerp_(grad.float(), 0.1)
            square = state.optimizer[f"{name}/exp_avg_sq"].lerp_(grad.float().square(), 0.001)
            weight.data.add_((moment / (square.sqrt() + 1e-8)).to(weight.dtype), alpha=-1e-4)
            return  # one layer's worth: what a whole step costs is the model's, not the checkpoint's


def touch(value: Any) -> None:
    """Read one byte of every page of every tensor."""
    import torch

    for item in value.values() if isinstance(value, dict) else ():
        if isinstance(item, torch.Tensor):
            item.reshape(-1).view(torch.uint8)[::4096].sum()
        else:
            touch(item)


def peers(way: str, folder: Path, gigabytes: float) -> Callable[[], None]:
    import torch

    if way.startswith("torch"):
        return lambda: touch(torch.load(folder / "torch/1.pt", mmap="mmap" in way, weights_only=True))
    if way == "safetensors":
        from safetensors.torch import load_file

        return lambda: [touch(load_file(p)) for p in sorted((folder / "safetensors/1").iterdir())] and None
    from torch.distributed.checkpoint import load

    state = make_state(gigabytes)
    return lambda: load(state, checkpoint_id=folder / "dcp/1", no_dist=True)


def measure(way: str, folder: Path, gigabytes: float) -> dict[str, Any]:
    """Seconds of one cold load in this process, and its memory over the bytes it must hold."""
    work: Callable[[], Any]
    if way.startswith("raw"):
        work = lambda: raw(folder, kept="kept" in way)  # noqa: E731
    elif way == "ours":
        import tensorkeep.training.saver

        work = lambda: touch(vars(ours(folder)))  # noqa: E731
        assert tensorkeep.training.saver
    elif way == "ours, first step":
        import tensorkeep.training.saver

        assert tensorkeep.training.saver
        work = lambda: first_step(folder)  # noqa: E731
    else:
        work = peers(way, folder, gigabytes)
    size = sum(p.stat().st_size for p in (folder / "ours/checkpoints/step-000001").iterdir())
    forget(folder)
    with Peak() as peak:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return {"way": way, "seconds": seconds, "extra": peak.most - peak.start - size, "anonymous": anonymous(os.getpid())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.folder, given.gigabytes)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        write_all(Path(folder), given.gigabytes)
        for _ in range(given.rounds):
            for way in given.ways:
                command = [sys.executable, "-m", "benchmarks.load", "--one", way, "--folder", folder]
                command += ["--gigabytes", str(given.gigabytes)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[way].append(json.loads(out.splitlines()[-1]))
    print(f"{versions('torch', 'safetensors')}; {given.gigabytes} GB, cold, median of {given.rounds}")
    floor = statistics.median(r["seconds"] for r in found[given.ways[0]])
    print("| way | s | x raw | memory over the state MB |\n|---|---|---|---|")
    for way, rows in found.items():
        seconds, extra = (statistics.median(r[k] for r in rows) for k in ("seconds", "extra"))
        print(f"| {way} | {seconds:.2f} | {seconds / floor:.2f} | {extra / 1e6:.0f} |")


if __name__ == "__main__":
    main()
