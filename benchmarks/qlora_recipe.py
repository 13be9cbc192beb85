"""QLoRA of a folder of an 8B's shape through the ordinary recipe, within a limit of GPU memory or under a word of it.

    python -m benchmarks.qlora_recipe --folder /data/random-8b --limit 12 --length 32768
    python -m benchmarks.qlora_recipe --folder /data/random-8b --memory least --rows 4 --length 2048 --document 512

The folder of random bfloat16 weights (16 GB), its tokenizer and the texts are written once. Rows are packed with
documents of `--document` tokens (0: one a row). Each run is a process of its own: start it again to see what compiled
code that is cached saves. Prints one line of JSON: seconds to build (load, quantize, tokenize), seconds of the first
update, tokens/s (the median of the later ones), GiB that torch had allocated and held at most, what was said, losses.
With `--save` every update is saved, kernels are deterministic, and a run that is in `--out` already goes on; a digest
of what was trained tells whether it came to the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantize_load import SHAPES, write

WORDS = 1000


def prepare(folder: Path, size: str) -> None:
    """Write weights and a tokenizer, once."""
    if not (folder / "config.json").is_file():
        write(folder, size)
    if (folder / "tokenizer.json").is_file():
        return
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)} | {"<eos>": WORDS, "<pad>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))


def texts(path: Path, documents: int, tokens: int) -> None:
    """Write random documents of so many tokens each."""
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(f"w{drawn.randrange(WORDS)}" for _ in range(tokens))}) + "\n")


def compiling() -> dict[str, Any]:
    """What torch's compiler did: seconds of its phases, and how often its caches were right."""
    from torch._dynamo.utils import compile_times, counters

    names, took = compile_times("csv", aggregate=True)
    seconds = {name: round(float(one), 2) for name, one in zip(names, took) if float(one) >= 0.3}
    kept = ("aot_autograd", "inductor", "frames", "stats", "graph_break")
    return {"seconds": seconds, "counts": {name: dict(counters[name]) for name in kept if counters[name]}}


def digest(model: torch.nn.Module) -> str:
    """Digest the bits of what trains."""
    made = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            made.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return made.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the run's folder (default: in FOLDER)")
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--memory", choices=["least", "balanced", "most"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--document", type=int, default=0)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="layers are not compiled")
    parser.add_argument("--save", action="store_true", help="each update, under deterministic kernels")
    parser.add_argument("--host", type=float, help="GiB of main memory to plan with (default: what the machine has)")
    given = parser.parse_args()
    prepare(given.folder, given.size)
    from tensorkeep.language import _memory
    from tensorkeep.language._memory_plan import GIB
    from tensorkeep.language.job import build, loop_of
    from tensorkeep.language.recipe_text import language_recipe
    from tensorkeep.training.distributed import World
    from tensorkeep.training.loop import fit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = given.out or given.folder / f"run-{time.time_ns()}"
    run.mkdir(parents=True, exist_ok=given.save)
    document = given.document or given.length
    file = given.folder / f"texts-{given.rows}x{given.length}-{document}-{given.updates}.jsonl"
    if not file.exists():
        texts(file, given.rows * given.updates * (given.length // document), document)
    training: dict[str, Any] = {
        "updates": given.updates,
        "batch_size": given.rows,
        "precision": "bf16",
        "quantize_backbone": "nf4",
        "compile": not given.eager,
        "log_every": 1,
        "memory": given.memory,
        "memory_limit_gib": given.limit,
    }
    if given.save:
        training |= {"save_every": 1, "deterministic": True}
    if given.host:
        _memory.main_memory = lambda: round(given.host * GIB)  # type: ignore[attr-defined]
    data = {"files": str(file), "length": given.length, "packing": "first_fit", "eos": False}
    adapter = {"lora_r": 16, "lora_alpha": 32}
    optimizer = {"lr": 1e-4}
    model = {"version": 2, "model": str(given.folder), "objective": "pretrain"}
    recipe = language_recipe(model | {"data": data, "training": training, "adapter": adapter, "optimizer": optimizer})
    lines: list[str] = []
    ends: list[float] = []
    losses: list[float] = []
    before = time.perf_counter()
    job = build(recipe, run, World(device=device), lines.append)
    built = time.perf_counter()
    loading = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def told(row: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        losses.append(round(row["loss"], 4))

    job.trackers.append(told)
    outcome = fit(job, run, loop_of(recipe, len(job.data)), world=World(device=device))
    seconds = [b - a for a, b in zip([built, *ends], ends)]
    rate = given.rows * given.length / statistics.median(seconds[1:] or seconds)
    cuda = device.type == "cuda"
    found = {
        "limit_gib": given.limit,
        "memory": given.memory,
        "shape": f"{given.rows}x{given.length}",
        "document": document,
        "built_s": round(built - before, 2),
        "first_update_s": round(seconds[0], 2),
        "tokens_per_s": round(rate, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "held_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
        "loading_gib": round(loading, 3),
        "said": [line for line in lines if "memory" in line or "mask" in line],
        "losses": losses,
        "level": outcome.level,
        "trained": digest(job.model),
        "compiling": compiling(),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
