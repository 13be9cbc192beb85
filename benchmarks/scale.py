"""A sharded run's start beside the whole way and beside torch's own: bytes read, memory and wire of each rank.

    python -m benchmarks.scale [--parts start] [--ranks 2 4] [--folder DIR] [--out benchmarks/results/scale.md]

Ranks are processes of torchrun on the CPU (gloo). *ours* builds a recipe's job as `tensorkeep train language` does;
*whole* is what it did before: every rank loads the model, then shards are cut from it; so are *fp32 gathers*.
*dcp.load* fills the same FSDP2 model, made on meta, from a DCP folder of the same tensors in float32. Memory is
anonymous memory (RssAnon, sampled) above what the process had when its imports were done, until the shards are
filled. Bytes read are those of /proc/self/io (`rchar`, the page cache included; safetensors maps its files, which no
counter sees). The first step is a forward and backward of one row; its wire is what the loopback interface, of a
network namespace of its own where the system allows one, carried meanwhile over all ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import anonymous, forget, versions

WAYS = ("ours", "ours, fp32 gathers", "whole", "dcp.load", "ours nf4", "whole nf4")
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
LINES = ("one token follows another", "a small model learns from small texts", "the rest of the line is here")


def made(folder: Path) -> None:
    """Write a Llama of 88 million parameters in bf16 as an hf folder and as a DCP folder, a tokenizer and texts."""
    import torch
    import torch.distributed.checkpoint as dcp
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tensorkeep.language.start import from_config

    shape = {**SHAPE, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": False}
    model: Any = from_config({"model_type": "llama", "max_position_embeddings": 512, **shape}, seed=1)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    dcp.save({"model": model.float().state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
    words = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<eos>", *" ".join(LINES).split()]))}
    split: Any = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")
    fast.save_pretrained(folder / "base")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": " ".join(LINES)}) + "\n" for _ in range(8)))


def recipe(folder: Path, codes: bool) -> Any:
    """The recipe of a run: the whole model in bf16, or an adapter over nf4 codes."""
    from tensorkeep.language.recipe_text import language_recipe

    training: dict[str, Any] = {"updates": 1, "batch_size": 4, "parallel": "fsdp", "precision": "bf16"}
    document: dict[str, Any] = {"version": 2, "model": str(folder / "base"), "training": training}
    document["data"] = {"files": str(folder / "a.jsonl"), "length": 32}
    if codes:
        document["adapter"] = {"lora_r": 8}
        training["quantize_backbone"] = "nf4"
    return language_recipe(document)


class Watch:
    """Samples anonymous memory from its start to its end."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous(os.getpid())
        self.going = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.going:
            self.peak = max(self.peak, anonymous(os.getpid()))
            time.sleep(0.005)

    def end(self) -> tuple[int, int]:
        """The peak, and what is still held once the allocator has given back what it keeps; both above the start."""
        self.going = False
        self.thread.join()
        ctypes.CDLL(None).malloc_trim(0)
        return self.peak - self.before, anonymous(os.getpid()) - self.before


def start(folder: Path, way: str) -> dict[str, Any]:
    """One rank's start in one way, and its first step."""
    import torch

    from tensorkeep.formats import view
    from tensorkeep.language import job as building
    from tensorkeep.language import start as starting
    from tensorkeep.training import distributed, fsdp
    from tensorkeep.training.precision import GATHERED

    world = distributed.start("cpu")
    made_of, filled = recipe(folder, way.endswith("nf4")), dict[str, Any]()
    place: Callable[..., Any] = building._place
    starting._skeleton(view.read(folder / "base")).state_dict()  # what is imported is not counted
    if way == "ours, fp32 gathers":
        building.GATHERED = {}
    counter, taken = _counted(), time.perf_counter()
    watch = Watch()
    if way == "dcp.load":
        model = _by_dcp(folder, world, starting, fsdp)
    else:
        if way.startswith("whole"):
            starting.why_whole = lambda *_: "asked for"

        def placed(begun: Any, *rest: Any) -> None:
            place(begun, *rest)
            if not fsdp.is_sharded(begun.model):
                fsdp.shard_modules(begun.model, fsdp.blocks(begun.model), world, GATHERED["bf16"])
            filled.update(zip(("peak", "held"), watch.end()), read=counter(), wall=time.perf_counter() - taken)

        building._place = placed
        model = building.build(made_of, folder / f"run-{world.size}", world).model
    if not filled:
        filled.update(zip(("peak", "held"), watch.end()), read=counter(), wall=time.perf_counter() - taken)
    parameters = [p for p in model.parameters()]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    filled["share"] = sum(p.numel() * p.element_size() for p in held)
    ids = torch.arange(32)[None] % 20
    distributed.gathered(world, None)
    wire = loopback()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    distributed.gathered(world, None)
    filled |= {"wire": loopback() - wire, "loss": float(loss)}
    distributed.stop()
    return filled


def _by_dcp(folder: Path, world: Any, starting: Any, fsdp: Any) -> Any:
    """The same FSDP2 model, filled by torch's own loader."""
    import torch.distributed.checkpoint as dcp

    from tensorkeep.formats.view import read
    from tensorkeep.models.repair import repair_buffers
    from tensorkeep.training.precision import GATHERED

    model = starting._skeleton(read(folder / "base"))
    repair_buffers(model)
    fsdp.shard_modules(model, fsdp.blocks(model), world, GATHERED["bf16"])
    fsdp.materialise(model, world.device)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    return model.train()


def _counted() -> Callable[[], int]:
    """Count the bytes that this process reads from here on."""

    def read_so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = read_so_far()
    return lambda: read_so_far() - before


def loopback() -> int:
    """Bytes that the loopback interface has carried."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


PARTS: dict[str, tuple[Callable[[Path, str], dict[str, Any]], tuple[str, ...]]] = {"start": (start, WAYS)}


def table(part: str, ranks: int, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The rows of one part and number of ranks."""
    head = ["way", "share a rank", "peak a rank", "held after", "read, all ranks", "wall", "first step's wire", "loss"]
    lines = [f"## {part}, {ranks} ranks", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way, rows in found.items():
        most = {key: max(row[key] for row in rows) for key in ("share", "peak", "held", "wall", "wire")}
        cells = [f"{most[key] / 1e6:,.0f} MB" for key in ("share", "peak", "held")]
        cells += [f"{sum(row['read'] for row in rows) / 1e6:,.0f} MB", f"{most['wall']:.1f} s"]
        cells += [f"{most['wire'] / 1e6:,.0f} MB", f"{rows[0]['loss']:.6f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, way = options.child
        found = PARTS[part][0](options.folder, way)
        (options.folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="scale-"))
    if not (folder / "base").is_dir():
        made(folder)
    stored = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    lines = [f"base: {stored / 1e6:,.0f} MB of bf16; {versions('torch', 'transformers')}", ""]
    for part in options.parts:
        for ranks in options.ranks:
            results = {way: _ranks(folder, part, way, ranks) for way in PARTS[part][1]}
            lines += table(part, ranks, results)
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def _ranks(folder: Path, part: str, way: str, ranks: int) -> list[dict[str, Any]]:
    """Run one way in a group of processes of its own."""
    forget(folder / "base")
    alone = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "ranks"] if alone else []
    command += [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "benchmarks.scale"]
    command += ["--folder", str(folder), "--child", part, way]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[:3000]}")
    for run in folder.glob("run-*"):
        subprocess.run(["rm", "-rf", str(run)], check=True)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    main()
