"""Saves and resumes of a sharded state over gloo ranks: ours beside dcp.save and dcp.load of the same FSDP2 model.

    python -m benchmarks.scale_state [--parameters 95e6] [--ranks 2 4] [--saves 3] [--folder DIR]
    python -m benchmarks.scale_state --whole
    python -m benchmarks.scale_state --plan 64

A stack of matrices under `fully_shard` with AdamW's moments and an average, all fp32: S is 16 bytes a parameter. Every
way runs in processes of its own, over a loopback device of its own where the system lets us (`unshare -rn`), so that
its counters are the bytes over the wire. *Stall* is what a save holds the caller, *durable* the time until it may be
counted on; ours digests and fsyncs every file and the folder, dcp.save fsyncs its files. *Extra* is the most anonymous
memory above what the rank held before the save, *peak* above what it held before there was a model. Resumes read the
checkpoint that N ranks wrote on N, N/2 and 2N, from the page cache; *read* is the sum over the ranks of what their read
calls returned (`rchar`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, versions

WIDTH = 1024


def model_of(parameters: float, size: int) -> tuple[Any, Any, dict[str, Any]]:
    """The model in shards, its optimizer after a step, its average."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layers = max(1, round(parameters / (8 * WIDTH * WIDTH + WIDTH)))
    with torch.device("meta"):
        parts = [
            torch.nn.Sequential(torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False), torch.nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(layers)
        ]
        model = torch.nn.Sequential(*parts)
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for part in (*parts, model):
            fully_shard(part, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for slots in optimizer.state.values():
        for slot in ("exp_avg", "exp_avg_sq"):
            torch.nn.init.normal_(slots[slot])
    optimizer.zero_grad()
    return model, optimizer, {n: p.detach().clone() for n, p in model.named_parameters()}


def state_of(model: Any, optimizer: Any, averages: dict[str, Any], step: int) -> Any:
    """The state as a run saves it."""
    from tensorkeep.training.live_state import optimizer_state, stored_tensors
    from tensorkeep.training.saver import State

    tensors, groups = optimizer_state(model, optimizer)
    document = {"step": step, "optimizer": groups}
    return State(stored_tensors(model, base=False)[0], tensors, averages, document)


def nested(state: Any) -> dict[str, Any]:
    """The same for torch.distributed.checkpoint."""
    return {"model": state.model, "optimizer": state.optimizer, "ema": state.ema}


@contextmanager
def watched(found: dict[str, Any], empty: int | None = None) -> Iterator[None]:
    """Note the seconds, the anonymous memory above what was there (or above `empty`), and what read calls returned."""
    gc.collect()
    before, peak, over = anonymous(os.getpid()) if empty is None else empty, 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, anonymous(os.getpid()))
            time.sleep(0.005)

    watcher = threading.Thread(target=look)
    watcher.start()
    read, started = returned(), time.perf_counter()
    try:
        yield
    finally:
        found["seconds"], found["read"] = time.perf_counter() - started, returned() - read
        over.set()
        watcher.join()
        found["extra"] = max(0, peak - before)


def returned() -> int:
    """What the read calls of this process returned, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def wire() -> int:
    """Bytes sent over the loopback device."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def save(way: str, place: Path, parameters: float, saves: int, world: Any) -> dict[str, Any]:
    """One rank's part of several saves; the last stays."""
    import torch.distributed.checkpoint as dcp

    import tensorkeep as tk
    from tensorkeep.training import distributed
    from tensorkeep.training.saver import Keep, Saver

    model, optimizer, averages = model_of(parameters, world.size)
    state = state_of(model, optimizer, averages, 0)
    local = [t.to_local() if hasattr(t, "to_local") else t for part in nested(state).values() for t in part.values()]
    out: dict[str, Any] = {"share": sum(t.nbytes for t in local), "saves": []}
    out["largest"] = max(t.nbytes for t in local)
    group = None if way == "whole" else world
    saver = Saver(place, Keep(last=1), background=True, world=group) if way in ("run", "whole") else None
    for step in range(saves):
        state = state_of(model, optimizer, averages, step)
        distributed.gathered(world, None)
        sent, found = wire(), dict[str, Any]()
        with watched(found):
            started = time.perf_counter()
            if saver is not None:
                saver.save(state)
                found["stall"] = time.perf_counter() - started
                saver.wait()
                found["durable"] = saver.durations[-1]
            else:
                folder = place / f"step-{step}"
                writer = tk.DurableWriter(folder) if way == "writer" else dcp.FileSystemWriter(folder)
                dcp.save(nested(state), storage_writer=writer)
                found["stall"] = found["durable"] = time.perf_counter() - started
        distributed.gathered(world, None)
        found["wire"] = wire() - sent
        out["saves"].append(found)
        if saver is None and world.first and step:
            shutil.rmtree(place / f"step-{step - 1}")
    if saver is not None:
        saver.close()
    return out


def resume(way: str, place: Path, parameters: float, world: Any) -> dict[str, Any]:
    """One rank's part of a resume."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard  # noqa: F401  likewise

    import tensorkeep as tk
    from tensorkeep.training import _shard_load, distributed  # noqa: F401  loaded before anything is measured
    from tensorkeep.training import saver as checkpoint
    from tensorkeep.training._shard_fill import filled
    from tensorkeep.training._sharding import like
    from tensorkeep.training._whole_load import WholeFiles  # noqa: F401  likewise
    from tensorkeep.training.live_state import put_optimizer, put_tensors

    empty = anonymous(os.getpid())
    model, optimizer, averages = model_of(parameters, world.size)
    if way in ("run", "shared", "each"):
        optimizer.state.clear()
    distributed.gathered(world, None)
    sent, found = wire(), dict[str, Any]()
    with watched(found, empty):
        if way in ("run", "shared"):
            state = checkpoint.opened(run_step(place), world if way == "shared" else None)
            state = filled(state, model, optimizer, averages, world)
            put_optimizer(model, optimizer, state.optimizer, state.document["optimizer"], adopt=True)
        elif way == "each":
            state = checkpoint.load(run_step(place))
            put_tensors(model, state.model, base=False)
            put_optimizer(model, optimizer, state.optimizer, state.document["optimizer"], adopt=True)
            averages = {n: like(state.ema[n], a) for n, a in averages.items()}
            del state
        else:
            reader = tk.DurableReader(run_step(place)) if way == "reader" else dcp.FileSystemReader(run_step(place))
            dcp.load(nested(state_of(model, optimizer, averages, 0)), storage_reader=reader)
    distributed.gathered(world, None)
    found["wire"] = wire() - sent
    assert all(torch.isfinite(p.to_local() if hasattr(p, "to_local") else p).all() for p in model.parameters())
    return found


def run_step(place: Path) -> Path:
    """The newest step folder of a run or of dcp.save."""
    return max((*place.glob("checkpoints/step-*"), *place.glob("step-*")), key=lambda p: p.stat().st_mtime)


def child(arguments: argparse.Namespace) -> None:
    """Be one rank: do the part and print what was found."""
    import torch

    from tensorkeep.training import distributed

    torch.set_num_threads(1)
    world = distributed.start("cpu")
    part, place = arguments.part, Path(arguments.folder)
    found = (
        save(arguments.way, place, arguments.parameters, arguments.saves, world)
        if part == "save"
        else resume(arguments.way, place, arguments.parameters, world)
    )
    gathered = distributed.gathered(world, found)
    if world.first:
        print(json.dumps(gathered))
    sys.stdout.flush()
    os._exit(0)  # torch may abort as it is taken down


def launch(part: str, way: str, ranks: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one part on some ranks, over a loopback device of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    numbers = [f"--parameters={options.parameters}", f"--saves={options.saves}", f"--folder={folder}"]
    own = [sys.executable, "-m", "benchmarks.scale_state", f"--part={part}", f"--way={way}", *numbers]
    each = 'for R in $(seq 0 $((N - 1))); do RANK=$R LOCAL_RANK=$R WORLD_SIZE=$N "$@" & P="$P $!"; done; '
    each += "for p in $P; do wait $p || exit 1; done"
    script = f"N={ranks}; {each}"
    command = ["bash", "-c", script, "bash", *own]
    if options.apart:
        command = ["unshare", "-rn", "bash", "-c", f"ip link set lo up; {script}", "bash", *own]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{part} {way} on {ranks} ranks failed:\n{done.stderr[-9000:]}")
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def plan(ranks: int) -> str:
    """What the planning of a save costs the first rank: a Llama of 70B with moments and average, no tensor made."""
    import pickle

    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    from tensorkeep.training._dcp_metadata import pickled, unpickled
    from tensorkeep.training._shard_files import lay_out

    wide, inner, kv = 8192, 28672, 1024
    layer = {"q": (wide, wide), "k": (kv, wide), "v": (kv, wide), "o": (wide, wide), "up": (inner, wide)}
    layer |= {"gate": (inner, wide), "down": (wide, inner), "norm1": (wide,), "norm2": (wide,)}
    shapes = {f"layers.{i}.{n}": s for i in range(80) for n, s in layer.items()}
    shapes |= {"embed": (128256, wide), "head": (128256, wide), "norm": (wide,)}
    names = {f"{part}{n}": s for part in ("model.", "optimizer.m/", "optimizer.v/", "ema.") for n, s in shapes.items()}

    def item(name: str, shape: tuple[int, ...], rank: int) -> WriteItem:
        rows = -(-shape[0] // ranks)
        offset = torch.Size((rank * rows, *(0,) * (len(shape) - 1)))
        chunk = ChunkStorageMetadata(offset, torch.Size((rows, *shape[1:])))
        data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size((rows * ranks, *shape[1:])))
        return WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)

    plans = [SavePlan([item(n, s, rank) for n, s in names.items()], planner_data={}) for rank in range(ranks)]
    sent = len(pickle.dumps(plans[0]))
    planner = DefaultSavePlanner()
    started = time.process_time()
    planned, metadata = planner.create_global_plan(plans)
    global_seconds, started = time.process_time() - started, time.process_time()
    share = lay_out("__0_0.distcp", planned[0].items, {})
    own_seconds, started = time.process_time() - started, time.process_time()
    places = {i.index: ("__0_0.distcp", 0, 1) for p in planned for i in p.items}
    data = pickled(metadata, places)
    write_seconds, started = time.process_time() - started, time.process_time()
    unpickled(data, Path())
    read_seconds = time.process_time() - started
    slots = sum(len(i.slots) for i in share.items.values())
    numbers = (
        f"{ranks} ranks, {len(places):,} chunks, CPU seconds: {sent / 1e6:.2f} MB of plan a rank each way, planned in",
        f"{global_seconds:.1f} s; a rank's file ({len(share.items):,} chunks, {slots:,} digests) laid out in",
        f"{own_seconds:.2f} s; .metadata of {len(data) / 1e6:.0f} MB written in {write_seconds:.1f} s, read in",
        f"{read_seconds:.1f} s; {anonymous(os.getpid()) / 1e9:.1f} GB of memory",
    )
    return " ".join(numbers)


def row_of_save(way: str, ranks: int, found: list[dict[str, Any]]) -> str:
    """One line of the table of saves; times are those of the slowest rank, medians of the later saves."""
    size = sum(f["share"] for f in found)
    later = range(1, len(found[0]["saves"])) or range(1)

    def median(key: str, of: Any) -> float:
        return statistics.median(of(f["saves"][i][key] for f in found) for i in later)

    first = max(f["saves"][0]["stall"] for f in found)
    extra = max(s["extra"] for f in found for s in f["saves"]) / 1e6
    share = max(f["share"] for f in found) / 1e6
    wire_first = found[0]["saves"][0]["wire"] / size * 100
    cells = (
        f"{first:.2f}",
        f"{median('stall', max):.2f}",
        f"{median('durable', max):.2f}",
        f"{share:.0f}",
        f"{extra:.0f}",
        f"{wire_first:.3f}",
        f"{median('wire', max) / size * 100:.3f}",
    )
    return f"| {way} | {ranks} | {' | '.join(cells)} |"


def row_of_resume(way: str, wrote: int, ranks: int, found: list[dict[str, Any]], size: int) -> str:
    """One line of the table of resumes."""
    read, extra = sum(f["read"] for f in found), max(f["extra"] for f in found)
    cells = (
        f"{max(f['seconds'] for f in found):.2f}",
        f"{read / size:.3f}",
        f"{size / ranks / 1e6:.0f}",
        f"{extra / 1e6:.0f}",
        f"{found[0]['wire'] / size * 100:.3f}",
    )
    return f"| {way} | {wrote} | {ranks} | {' | '.join(cells)} |"


def whole(place: Path, options: argparse.Namespace) -> None:
    """Print the table of resumes of a checkpoint that one process wrote."""
    try:
        options.saves = 1
        size = sum(f["share"] for f in launch("save", "whole", 1, place / "whole", options))
        for now in options.ranks:
            for way in ("each", "shared"):
                found = launch("resume", way, now, place / "whole", options)
                print(row_of_resume(way, 1, now, found, size), flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Run every part on every number of ranks and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=95e6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--whole", action="store_true", help="resumes of a whole checkpoint, nothing else")
    parser.add_argument("--plan", type=int, default=0, help="plan a save of 70B on so many ranks, nothing else")
    parser.add_argument("--part", default="")
    parser.add_argument("--way", default="")
    options = parser.parse_args()
    if options.part:
        child(options)
        return
    if options.plan:
        print(plan(options.plan))
        return
    options.apart = (
        subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0
    )
    place = Path(tempfile.mkdtemp(dir=options.folder))
    print(versions("torch"), f"loopback {'of its own' if options.apart else 'shared with others'}", sep="; ")
    saves, resumes = [], []
    if options.whole:
        whole(place, options)
        return
    try:
        for ranks in options.ranks:
            for way in ("dcp.save", "writer", "run"):
                found = launch("save", way, ranks, place / f"{way}-{ranks}", options)
                saves.append(row_of_save(way, ranks, found))
                print(saves[-1], flush=True)
                size = sum(f["share"] for f in found)
                if way == "writer":
                    shutil.rmtree(place / f"{way}-{ranks}")
            for now in (ranks, ranks // 2, 2 * ranks):
                for way, source in (("dcp.load", "dcp.save"), ("run", "run")):
                    found = launch("resume", way, now, place / f"{source}-{ranks}", options)
                    resumes.append(row_of_resume(way, ranks, now, found, size))
                    print(resumes[-1], flush=True)
            shutil.rmtree(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
