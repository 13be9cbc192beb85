"""What large models take: a simulated save and resume of 70B over many ranks, and the table of docs/reference/scale.md.

    python -m benchmarks.scale_plan [--wrote 64] [--reads 32] [--folder DIR]
    python -m benchmarks.scale_plan --table [--disk 2.0] [--out docs/reference/scale.md]

The simulation makes no tensor: the state of a Llama of 70B (weights, moments, average in float32, 1.13 TB) is described
on meta, planned by torch's planner for all ranks, laid out by our code, and put on the disk as sparse files of their
true sizes with lists of digests, `.metadata` and manifest written by the code of a real save. Then one rank of another
number opens it as a resume does (a process group of torch's `fake` backend stands for the others), plans its reads, and
finds every piece that it would read; the bytes are added up, not read. Seconds are CPU seconds of this process, so that
other processes on the machine count little.

The table: bytes are those of the code's own layouts (rows of a rank: `formats.dcp.chunks_of`; codes and scales:
`quantization.packed`), seconds are bytes by a rate that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import anonymous, versions

Shapes = dict[str, tuple[int, ...]]
PARTS = ("model.{}", "optimizer.{}/exp_avg", "optimizer.{}/exp_avg_sq", "ema.{}")


class Size(NamedTuple):
    """The shape of a Llama."""

    width: int
    inner: int
    kv: int
    layers: int
    vocabulary: int = 128_256


SIZES = {
    "8B": Size(4096, 14336, 1024, 32),
    "70B": Size(8192, 28672, 1024, 80),
    "405B": Size(16384, 53248, 1024, 126),
}


def shapes_of(size: Size) -> Shapes:
    """Names and shapes of all weights."""
    w, i, kv, layers, rows = size
    linears = {"self_attn.q_proj": (w, w), "self_attn.k_proj": (kv, w), "self_attn.v_proj": (kv, w)}
    linears |= {"self_attn.o_proj": (w, w), "mlp.gate_proj": (i, w), "mlp.up_proj": (i, w), "mlp.down_proj": (w, i)}
    layer: Shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    layer |= {"input_layernorm.weight": (w,), "post_attention_layernorm.weight": (w,)}
    out: Shapes = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    ends: Shapes = {"model.embed_tokens.weight": (rows, w), "model.norm.weight": (w,), "lm_head.weight": (rows, w)}
    return out | ends


# -- the simulation ---------------------------------------------------------------------------------------------------


@contextmanager
def timed(what: str, found: dict[str, str]) -> Iterator[None]:
    """Note the CPU seconds of a step, and the anonymous memory at its end."""
    begun = time.process_time()
    yield
    found[what] = f"{time.process_time() - begun:.1f} s, {anonymous(os.getpid()) / 1e9:.2f} GB"


def written(folder: Path, shapes: Shapes, ranks: int, found: dict[str, str]) -> None:
    """Plan and lay out a save of many ranks, and put the folder on the disk with sparse data."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    from tensorkeep.formats.dcp import chunks_of
    from tensorkeep.storage import durable
    from tensorkeep.storage.manifest_entries import FileEntry, list_bytes, list_name
    from tensorkeep.training import _shard_files as files
    from tensorkeep.training._shard_commit import About, complete, described

    names = {part.format(n): s for part in PARTS for n, s in shapes.items()}
    items: list[list[Any]] = [[] for _ in range(ranks)]
    for name, shape in names.items():
        for rank, (corner, extent) in enumerate(chunks_of(shape, ranks)):
            chunk = ChunkStorageMetadata(torch.Size(corner), torch.Size(extent))
            data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
            items[rank].append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
    planner, plans = DefaultSavePlanner(), [SavePlan(own, planner_data={}) for own in items]
    with timed("the first rank plans for all", found):
        planned, metadata = planner.create_global_plan(plans)
    reports, digest = [], durable.digest(b"")
    for rank, plan in enumerate(planned):
        with timed("a rank lays out its file and lists its digests (of the last)", found):
            share = files.lay_out(f"__{rank}_0.distcp", plan.items, {})
            pieces = {slot.tensor: digest for item in share.items.values() for slot in item.slots}
            chunks = [digest] * -(-share.layout.size // durable.CHUNK)
            done = durable.Written(share.layout.size, chunks, pieces, [], {})
            listed = list_bytes(files._entries(share, done))
        with (folder / share.layout.name).open("xb") as file:
            file.truncate(share.layout.size)
        small = durable.write_small(folder / list_name(share.layout.name), listed)
        entries = {
            share.layout.name: FileEntry(done.size, done.chunks),
            list_name(share.layout.name): FileEntry(small.size, small.chunks),
        }
        places = {item.at: (share.layout.name, *item.place) for item in share.items.values()}
        reports.append(files.Report(share.layout.name, entries, places, "here"))
    with timed("the first rank writes .metadata and manifest", found):
        complete(folder, described(metadata, reports), reports, About(7, documents={"state.json": b'{"step": 7}\n'}))
    small_files = sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".distcp")
    chunks, data = sum(len(plan.items) for plan in planned), sum(r.files[r.file].size for r in reports)
    lists = f"{small_files / 1e6:.0f} MB of lists, manifest and .metadata"
    found["folder"] = f"{chunks:,} chunks, {data / 1e12:.2f} TB in {ranks} sparse files, {lists}"


def resumed(folder: Path, shapes: Shapes, ranks: int, found: dict[str, str]) -> None:
    """Open the folder as rank 1 of so many does, and add up what it would read."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tensorkeep.formats.dcp import chunks_of
    from tensorkeep.storage.manifest_entries import row_pieces
    from tensorkeep.storage.record import nbytes
    from tensorkeep.training import saver as checkpoint

    dist.init_process_group("fake", rank=1, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    with timed("a rank opens it: manifest, sizes, .metadata", found):
        state = checkpoint.opened(folder)
    own: dict[str, Any] = {}
    for part in PARTS:
        for name, shape in shapes.items():
            extents = [extent for _, extent in chunks_of(shape, ranks)]
            local = torch.empty(extents[1] if len(extents) > 1 else (0, *shape[1:]), device="meta")
            whole = torch.empty(shape, device="meta")
            made = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            own[part.format(name)] = made
    share = sum(t.to_local().numel() * 4 for t in own.values())
    shards = state.shards
    with timed("it plans its reads", found):
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(own, shards._metadata, is_coordinator=True)
        plan = planner.create_local_plan()
    with timed("it finds every piece in the lists of those files that it needs", found):
        read, pieces = 0, 0
        for item in plan.items:
            entry = shards._reader._shard(item.storage_index).entry
            row, start, rows = nbytes(entry.dtype, entry.shape[1:]), item.storage_offsets[0], item.lengths[0]
            for first, count in row_pieces(entry.dtype, entry.shape):
                if max(first, start) < min(first + count, start + rows):
                    read, pieces = read + count * row, pieces + 1
    found["reads"] = f"{read / 1e9:.1f} GB in {pieces:,} pieces, {read / share:.3f} of its share"


def shared(shapes: Shapes, ranks: int, found: dict[str, str]) -> None:
    """Plan how many ranks read the same state where it lies whole in files."""
    import numpy as np

    from tensorkeep.formats.dcp import chunks_of
    from tensorkeep.storage.durable import CHUNK
    from tensorkeep.training import _whole_load as whole

    runs: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    at = 0
    for shape in [shape for _ in PARTS for shape in shapes.values()]:
        row = 4 * math.prod(shape[1:])
        for rank, (corner, extent) in enumerate(chunks_of(shape, ranks)):
            runs[rank].append((at + corner[0] * row, at + (corner[0] + extent[0]) * row))
        at += row * shape[0]
    wanted = [np.array([run for run in own if run[0] < run[1]], np.int64) for own in runs]
    with timed("the same state in whole files: every rank plans who reads which 16 MiB", found):
        cut = [whole._Piece("all", n, b, min(b + CHUNK, at)) for n, b in enumerate(range(0, at, CHUNK))]
        plan = whole._plan(cut, wanted)
    handed, most = 0, max(sum(turn[rank] is not None for turn in plan) for rank in range(ranks))
    for turn in plan:
        for rank, piece in enumerate(turn):
            own = sum(e - b for _, b, e in whole._overlaps(piece, wanted[rank]))
            handed += piece.end - piece.begin - own if piece else 0
    part = f"at most {most * ranks / len(cut):.2f} of its part a rank"
    found["of whole files"] = f"{len(cut):,} pieces, {part}, {handed / at:.2f} of all handed on"


def simulate(place: Path | None, wrote: int, reads: int) -> dict[str, str]:
    """Both, with what they took."""
    found: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(dir=place)) / "step-000007"
    try:
        folder.mkdir()
        written(folder, shapes_of(SIZES["70B"]), wrote, found)
        resumed(folder, shapes_of(SIZES["70B"]), reads, found)
        shared(shapes_of(SIZES["70B"]), reads, found)
    finally:
        shutil.rmtree(folder.parent)
    return found


# -- the table --------------------------------------------------------------------------------------------------------


def largest(shapes: Shapes, ranks: int) -> int:
    """Elements of the rank that holds most: of every tensor the first chunk."""
    from tensorkeep.formats.dcp import chunks_of

    return sum(math.prod(chunks_of(shape, ranks)[0][1]) for shape in shapes.values())


def bytes_of_nf4() -> float:
    """Bytes of codes and scales for a weight, as the encoder makes them."""
    import torch

    from tensorkeep.quantization.packed import pack

    weight = torch.randn(1024, 4096)
    packed = pack(weight, "nf4", True, 64, "w")
    return sum(t.nbytes for n, t in packed.tensors.items() if t.numel() > 256) / weight.numel()


def is_linear(name: str) -> bool:
    """Whether a weight is quantized and gets an adapter: all linears but the head."""
    return name.endswith("_proj.weight")


def units_of(shapes: Shapes) -> tuple[int, int]:
    """Parameters of a layer, and of what is sharded as one beside the layers: embedding, head and norm."""
    layer = sum(math.prod(s) for n, s in shapes.items() if n.startswith("model.layers.0."))
    return layer, sum(math.prod(s) for n, s in shapes.items() if not n.startswith("model.layers."))


def full(shapes: Shapes, gpus: int) -> dict[str, float]:
    """A full fine-tune: weights, gradients, AdamW's moments, an average, all in float32 and sharded."""
    n, (layer, root) = largest(shapes, gpus), units_of(shapes)
    total = sum(math.prod(s) for s in shapes.values())
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "optimizer": 8 * n,
        "average": 4 * n,
        "gathered": 4 * root + 2 * 2 * layer + 4 * max(root, layer) if gpus > 1 else 0,
        "save": 16 * total,
        "start": 2 * n,
    }


def qlora(shapes: Shapes, gpus: int, rank: int = 16) -> dict[str, float]:
    """Low-rank updates of all linears over nf4; embedding, head and norms in float32."""
    linears = {n: s for n, s in shapes.items() if is_linear(n)}
    rest = {n: s for n, s in shapes.items() if n not in linears}
    low: Shapes = {f"{n}.A": (rank, s[1]) for n, s in linears.items()}
    low |= {f"{n}.B": (s[0], rank) for n, s in linears.items()}
    adapter, total, (layer, root) = largest(low, gpus), sum(math.prod(s) for s in low.values()), units_of(shapes)
    nf4 = bytes_of_nf4()
    return {
        "weights": nf4 * largest(linears, gpus) + 4 * largest(rest, gpus) + 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer": 8 * adapter,
        "average": 0,
        "gathered": 4 * root + 2 * nf4 * layer if gpus > 1 else 0,
        "save": 12 * total,
        "start": 2 * largest(shapes, gpus),
    }


WAYS = {"full": full, "QLoRA": qlora}
HELD = ("weights", "gradients", "optimizer", "average", "gathered")
HEAD = ("model", "GPUs", *HELD, "a GPU in all", "a save", "s a save", "start reads a rank")
GPUS = (1, 8, 64)
MOST = 70e9  # bytes of a GPU of 80 GB that are left for what is counted here


def table(disk: float) -> list[str]:
    """The rows of the page."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for title, way in WAYS.items():
        for name, size in SIZES.items():
            for gpus in GPUS:
                of = way(shapes_of(size), gpus)
                held = [of[k] for k in HELD]
                seconds = of["save"] / max(gpus // 8, 1) / disk / 1e9
                cells = [f"{b / 1e9:,.1f}" for b in (*held, sum(held), of["save"])]
                lines.append(
                    f"| {name} {title} | {gpus} | {' | '.join(cells)} | {seconds:,.1f} | {of['start'] / 1e9:,.1f} |"
                )
    return lines


def fits() -> str:
    """Which of the numbers of GPUs is the first that suffices."""
    said = []
    for title, way in WAYS.items():
        for name, size in SIZES.items():
            needs = {gpus: way(shapes_of(size), gpus) for gpus in GPUS}
            first = next((g for g, of in needs.items() if sum(of[k] for k in HELD) <= MOST), None)
            said.append(f"{name} {title}: {first or f'more than {GPUS[-1]}'}")
    return "; ".join(said)


PAGE = """# What 8B, 70B and 405B take

Made by `python -m benchmarks.scale_plan --table --out docs/reference/scale.md`. Every figure is arithmetic: none of
these runs was made here. [The log](../../benchmarks/results/scale.md) has what was measured, at smaller sizes, and what
a simulated save and resume of 70B over 64 ranks took.

Shapes are those of Llama 3.1: {sizes}. Figures are GB (10^9 bytes) of one GPU, *a save* of all ranks together.

- *full*: `parallel: fsdp`, `precision: bf16`, AdamW and an average (`ema`), all in float32: 20 bytes a parameter,
  divided over the GPUs by rows. *QLoRA*: `quantize_backbone: nf4`, r 16 on all linears; codes and scales are divided as
  well ({nf4:.3f} bytes a weight, as the encoder makes them), embedding and head are float32.
- *gathered*: two layers in bfloat16 (of QLoRA: as codes), embedding and head in float32, and the gradients of the
  largest of these before they are divided. **Activations are not counted**: they follow the tokens of a batch; see
  `training.memory` and `gradient_checkpointing`.
- *a save*: weights, moments and average (16 bytes a parameter), or the adapter with its moments (12). Every rank writes
  its own part; *s a save* is until it is durable, at {disk:g} GB/s a host of 8 GPUs. That rate is stated, not measured
  (`--disk` takes yours; 0.6 to 0.7 GB/s were measured on the two-core machine of the log, digests and fsync included).
  Training is held for the copy alone: 0.6 of 2.5 s there.
- *start reads a rank*: its rows of a base in bfloat16 (1.01 of them measured). A resume reads *a save* divided by the
  ranks (1.00 measured over all ranks).

{table}

With {most:.0f} GB of a GPU of 80 GB for what is counted here, the first of {gpus} GPUs that suffice: {fits}.
"""


def page(disk: float) -> str:
    """The page with its table."""
    counts = {n: sum(math.prod(s) for s in shapes_of(size).values()) / 1e9 for n, size in SIZES.items()}
    return PAGE.format(
        sizes=", ".join(f"{n} ({count:.1f} G parameters)" for n, count in counts.items()),
        nf4=bytes_of_nf4(),
        disk=disk,
        table="\n".join(table(disk)),
        most=MOST / 1e9,
        gpus=", ".join(map(str, GPUS)),
        fits=fits(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrote", type=int, default=64)
    parser.add_argument("--reads", type=int, default=32)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--disk", type=float, default=2.0, help="GB/s of a host's disk or share of the file system")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.table:
        text = page(options.disk)
        print(text)
        if options.out:
            options.out.write_text(text)
        return
    found = simulate(options.folder, options.wrote, options.reads)
    if options.json:
        print(json.dumps(found))
        return
    print(versions("torch"), f"70B written by {options.wrote} ranks, resumed by {options.reads}", sep="; ")
    print("| step | CPU seconds, memory held |\n|---|---|")
    print("\n".join(f"| {what} | {took} |" for what, took in found.items()))


if __name__ == "__main__":
    main()
