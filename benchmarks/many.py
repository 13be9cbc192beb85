"""How cost grows with the number of tensors, and of chunks that many ranks wrote: CPU seconds and peak memory.

    python -m benchmarks.many [--tensors 300 3000 30000 100000] [--megabytes 300] [--ranks 8 64] [--dir DIR]

Each row is a whole process, start-up included, over a safetensors file of as many bytes whatever the number of tensors.
CPU seconds are user and system of the child, memory is its peak RSS. The last table reads DCP metadata of 291 tensors
as torch gathers it from many ranks, beside torch's own `read_metadata`, in this process.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import versions
from tensorkeep.conversion.writing import write_all
from tensorkeep.formats.safetensors import layout
from tensorkeep.formats.view import read
from tensorkeep.storage.layout import Fixed, SinkTensor

CHILD = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
if done.returncode > 1:
    sys.exit(done.stderr.decode())
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def build(folder: Path, count: int, nbytes: int) -> Path:
    """Write one file of `count` equal bf16 matrices, `nbytes` in all."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rows = max(nbytes // count // 32, 1)
    tensors = [SinkTensor(f"blocks.{i // 9}.w{i % 9}.weight", "BF16", (rows, 16)) for i in range(count)]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 22, np.uint8).tobytes()
    (file,) = layout(tensors, shard_size=1 << 62)
    with (folder / file.name).open("wb") as stream:
        head = file.segments[0]
        assert isinstance(head, Fixed)
        write_all(stream.fileno(), head.data, 0)
        for at in range(len(head.data), file.size, len(noise)):
            write_all(stream.fileno(), noise[: file.size - at], at)
    return folder


def cost(*arguments: str) -> tuple[float, float]:
    """Run `tensorkeep`; return its CPU seconds and its peak memory in MB."""
    command = [sys.executable, "-m", "tensorkeep", *arguments]
    made = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(made.stderr)
    seconds, memory = made.stdout.split()
    return float(seconds), float(memory)


def rows(source: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Measure every command over one source."""
    found = {
        "inspect": cost("inspect", str(source)),
        "dry run to hf": cost("convert", str(source), str(out), "--to", "hf", "--dry-run"),
        "dry run to dcp": cost("convert", str(source), str(out), "--to", "dcp", "--dry-run"),
        "diff": cost("diff", str(source), str(source)),
    }
    for to in ("hf", "dcp"):
        shutil.rmtree(out, ignore_errors=True)
        found[f"convert to {to}"] = cost("convert", "--quiet", str(source), str(out), "--to", to)
    shutil.rmtree(out, ignore_errors=True)
    return found


def ranks(folder: Path, count: int, tensors: int = 291) -> int:
    """Write `.metadata` as torch gathers it from `count` ranks, and sparse data files; return the number of chunks."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, TensorStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for rank in range(count):
        chunks, places, at = {}, {}, 0
        for i in range(tensors):
            name, corner, size = f"model.layers.{i // 9}.w{i % 9}.weight", torch.Size((rank, 0)), torch.Size((1, 64))
            chunks[name] = ChunkStorageMetadata(corner, size)
            places[MetadataIndex(name, corner, rank)] = _StorageInfo(f"__{rank}_0.distcp", at, 1800)
            at += 1800
        # each rank's part reaches the first rank through a pickle of its own
        for name, chunk in pickle.loads(pickle.dumps(chunks)).items():  # noqa: S301  our own
            new = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((count, 64)), [])
            state.setdefault(name, new).chunks.append(chunk)
        stored |= pickle.loads(pickle.dumps(places))  # noqa: S301
        with (folder / f"__{rank}_0.distcp").open("wb") as file:
            file.truncate(at)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state, planner_data=None, storage_data=stored)))
    return len(stored)


def of_ranks(place: Path, counts: list[int]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    print("\n| ranks | chunks | reader | CPU s | us a chunk | bytes a chunk |\n|---|---|---|---|---|---|")
    for count in counts:
        folder = place / f"ranks-{count}"
        chunks = ranks(folder, count)
        for name, opened in (("torch", FileSystemReader(folder).read_metadata), ("tensorkeep", partial(read, folder))):
            opened()
            before = os.times()
            opened()
            after = os.times()
            seconds = after.user + after.system - before.user - before.system
            tracemalloc.start()
            kept = opened()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            del kept
            shown = f"{seconds:.2f} | {seconds / chunks * 1e6:.1f} | {peak / chunks:.0f}"
            print(f"| {count} | {chunks} | {name} | {shown} |", flush=True)
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[300, 3000, 30_000, 100_000])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--dir", type=Path, default=Path("build/bench-many"))
    arguments = parser.parse_args()
    print(versions("tensorkeep", "torch", "numpy"))
    print(f"\n{arguments.megabytes} MB; CPU s and peak MB\n")
    print(
        "| tensors | "
        + " | ".join(names := ["inspect", "dry run to hf", "dry run to dcp", "diff", "convert to hf", "convert to dcp"])
        + " |"
    )
    print("|---" * (len(names) + 1) + "|")
    for count in arguments.tensors:
        source = build(arguments.dir / f"{count}", count, arguments.megabytes * 1_000_000)
        found = rows(source, arguments.dir / "out")
        print(f"| {count} | " + " | ".join(f"{found[n][0]:.2f} s, {found[n][1]:.0f}" for n in names) + " |", flush=True)
        shutil.rmtree(source)
    of_ranks(arguments.dir, arguments.ranks)


if __name__ == "__main__":
    main()
