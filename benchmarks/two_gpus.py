"""Language runs on two GPUs through the ordinary recipe: `python -m benchmarks.two_gpus --out figures [--size 1b]`.

A checkpoint of random weights (Llama-3.2-1B's or Llama-3.1-8B's shape, bf16) and JSON lines are written first. Then,
each in processes of its own: one GPU, two under DDP, two under FSDP2, one that goes on from those shards; a full
fine-tune with an average (`full`), and LoRA over nf4 (`qlora`). Printed are tokens a second (median of the later
updates), the peak of a GPU's memory, seconds of the start, what the update after each save took longer, and bytes of a
save; for two processes also the seconds of `dcp.save`, of the same with `DurableWriter`, and of `dcp.async_save` until
it returns and until it is done, of what trains with its moments. Losses go to OUT/two_gpus.jsonl, row by row, so that a
cut loses only the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LENGTH = 2048


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SHAPES), default="1b")
    parser.add_argument("--ways", nargs="+", default=["qlora", "full"])
    parser.add_argument(
        "--runs", nargs="+", default=["one", "ddp", "fsdp", "resume"], help="resume: from fsdp's shards"
    )
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--saves", type=int, default=3, help="of the run")
    parser.add_argument("--turns", type=int, default=2, help="how often torch's own saves are timed")
    parser.add_argument("--savers", nargs="*", default=["dcp.save", "DurableWriter", "dcp.async_save"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=110, help="seconds of one run")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.rank:
        return on_a_rank(given.rank, given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="two_gpus_"))
    try:
        begun = time.perf_counter()
        write_model(place / "model", SHAPES[given.size])
        write_texts(place / "texts.jsonl")
        tell(given.out, {"made": round(time.perf_counter() - begun, 1), "size": given.size})
        for way in given.ways:
            for name, ranks, parallel in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
                if name in given.runs:
                    measure(given, place, way, name, ranks, parallel)
            if "resume" in given.runs:  # shards go on with one process: the same recipe, more updates
                measure(given, place, way, "fsdp", 1, "ddp", more=4)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return 0


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A checkpoint of random weights, drawn on a GPU where there is one, in bf16."""
    import torch
    from safetensors.torch import save_file
    from tests.language_files import save_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True)
    save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=32_768,
        num_key_value_heads=max(shape["num_attention_heads"] // 4, 1),
        tie_word_embeddings=False,
        **shape,
    )
    with torch.device("meta"):
        names = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    for name, size in names.items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=draw)
        shards[-1][name] = (torch.ones_like(tensor) if "norm" in name else tensor).cpu()
        if sum(t.nbytes for t in shards[-1].values()) > 2 << 30:
            shards.append({})
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for k, shard in enumerate(s for s in shards if s):
        file = f"model-{k}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))


def write_texts(path: Path) -> None:
    """Enough text for every update of every run, in lines of one seed."""
    import random

    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a", "tensor", "is", "kept"]
    with path.open("w") as file:
        for _ in range(1500):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=1500))}) + "\n")


def recipe_of(given: Any, place: Path, way: str, parallel: str, more: int) -> dict[str, Any]:
    """The recipe of a run: four rows of 2,048 tokens an update a GPU, saves in the middle."""
    training: dict[str, Any] = {
        "updates": given.updates + more,
        "epochs": None,
        "batch_size": 8,
        "micro_batch": 4,
        "precision": "bf16",
        "parallel": parallel,
        "gradient_checkpointing": True,
        "log_every": 1,
        "save_every": given.updates // given.saves,
        "workers": 2,
    }
    made: dict[str, Any] = {
        "version": 2,
        "model": str(place / "model"),
        "objective": "pretrain",
        "data": {"files": [str(place / "texts.jsonl")], "length": LENGTH, "packing": "concatenate"},
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "constant"},
        "training": training,
    }
    made["data"]["cache"] = str(place / "cache")
    if way == "qlora":
        made["adapter"] = {"lora_r": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "*_proj"]}
        training["quantize_backbone"] = "nf4"
    else:
        training["ema"] = 0.999
    return made


def measure(given: Any, place: Path, way: str, name: str, ranks: int, parallel: str, more: int = 0) -> None:
    """Make one run in processes of its own, and tell what it showed."""
    import yaml

    run = place / f"{way}_{name}"
    recipe = place / f"{way}_{name}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(given, place, way, parallel, more)))
    job = place / "job.json"
    job.write_text(json.dumps({"recipe": str(recipe), "run": str(run), "turns": given.turns, "savers": given.savers}))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    own = ["--rank", str(job), "--out", str(given.out), "--device", given.device]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    words = [sys.executable, *launch, "-m", "benchmarks.two_gpus", *own]
    begun = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=given.limit)
        said, code = done.stdout, done.returncode
        errors = done.stderr
    except subprocess.TimeoutExpired as error:
        said, code, errors = str(error.stdout or ""), 124, "over its limit"
    row: dict[str, Any] = {"way": way, "run": name, "ranks": ranks, "rc": code, "wall": time.perf_counter() - begun}
    found_ranks = [json.loads(line[5:]) for line in said.splitlines() if line.startswith("RANK ")]
    if code or len(found_ranks) != ranks:
        tell(given.out, {**row, "error": errors.partition("ChildFailedError")[0][-1500:]})
        return
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r and r["step"] > (given.updates if more else 0)]
    after = {r["step"]: r["seconds"] for r in steps}
    usual = statistics.median([s for n, s in after.items() if n > (given.updates if more else 0) + 2])
    row |= {
        "tokens/s": round(8 * LENGTH / usual),
        "peak GiB a GPU": [round(r["peak"] / 2**30, 2) for r in found_ranks],
        "start s": [round(r["start"], 1) for r in found_ranks],
        "host peak GiB": [round(r["host"] / 2**30, 2) for r in found_ranks],
        "updates after saves took more s": [
            round(after[n + 1] - usual, 3)
            for n in range(given.updates // given.saves, given.updates, given.updates // given.saves)
            if n + 1 in after
        ],
        "saved by dcp s": [r["dcp"] for r in found_ranks if r["dcp"]],
        "losses": [r["loss"] for r in steps],
        "how": sorted({r["how"] for r in found_ranks}),
        "wall": round(row["wall"], 1),
    }
    steps_made = sorted((run / "checkpoints").glob("step-*"))
    row["save bytes"] = sum(p.stat().st_size for p in steps_made[-1].rglob("*") if p.is_file())
    tell(given.out, row)


def on_a_rank(job_file: Path, device: str) -> int:
    """One process of a run: build and fit, then say what this process held."""
    import resource

    import torch

    from tensorkeep.language.job import build, loop_of
    from tensorkeep.language.recipe_text import read_language
    from tensorkeep.output import Output
    from tensorkeep.training import distributed
    from tensorkeep.training.loop import fit

    asked = json.loads(job_file.read_text())
    begun = time.perf_counter()
    world = distributed.start(device)
    said: list[str] = []
    try:
        recipe = read_language(asked["recipe"])
        job = build(recipe, asked["run"], world, said.append)
        started = time.perf_counter() - begun
        outcome = fit(
            job, asked["run"], loop_of(recipe, len(job.data)), world=world, allow=("training*",), say=Output(quiet=True)
        )
        peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"rank": world.rank, "peak": peak, "host": host, "start": started, "how": str(outcome.level)}
        found["dcp"] = saved_by_dcp(job, Path(asked["run"]).parent, world, asked) if world.size > 1 else None
        os.write(1, ("RANK " + json.dumps(found) + "\n").encode())
    finally:
        distributed.stop()
    return 0


def saved_by_dcp(job: Any, place: Path, world: Any, asked: Any) -> dict[str, float]:
    """Seconds of torch's own saves of what trains and its moments, and of one through `DurableWriter`, in turns."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import tensorkeep as tk

    state: dict[str, Any] = {}
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            moments = job.optimizer.state.get(parameter, {})
            state |= {name: parameter.detach(), **{f"{name}.{k}": t for k, t in moments.items() if torch.is_tensor(t)}}
    group = dist.new_group(backend="gloo")  # async_save wants one of CPUs
    took: dict[str, float] = {}
    for turn in ("first", "second", "third")[: asked["turns"]]:
        for name in asked["savers"]:
            folder = place / f"{turn}_{name}"
            dist.barrier()
            begun = time.perf_counter()
            if name == "dcp.save":
                dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
            elif name == "DurableWriter":
                dcp.save(state, storage_writer=tk.DurableWriter(folder))
            else:
                future = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
                took[f"{turn} {name} returned"] = round(time.perf_counter() - begun, 3)
                future.result()
            took[f"{turn} {name}"] = round(time.perf_counter() - begun, 3)
            dist.barrier()
            if world.rank == 0:
                shutil.rmtree(folder)
    return took


def tell(out: Path, row: dict[str, Any]) -> None:
    with (out / "two_gpus.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if k != "losses"}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
