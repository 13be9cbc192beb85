"""Load and quantize a checkpoint of an 8B model's shape to nf4: peak memory and time, ours and transformers' own.

A random bfloat16 checkpoint in shards is written once (`--size 8b` is 16 GB). Each way runs in a process of its own.
Memory is the process's anonymous memory, sampled, beside what a process that only imports torch holds; page cache is
not counted. The goal: quantized size + 1.2 GB on the CPU, where the largest tensor is 1.05 GB. transformers runs
where it, bitsandbytes and a GPU are there.

    python -m benchmarks.quantize_load --size 8b --folder /data/random-8b
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Run, run
from tensorkeep.formats import safetensors
from tensorkeep.quantization.loading import load_quantizing
from tensorkeep.quantization.modules import model_sizes
from tensorkeep.storage.layout import Fixed, SinkTensor, Slot

SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, key and value heads
    "tiny": (2048, 256, 512, 2, 8, 4),
    "1b": (128256, 2048, 8192, 16, 32, 8),
    "3b": (128256, 3072, 8192, 28, 24, 8),
    "8b": (128256, 4096, 14336, 32, 32, 8),
}
SHARD = 5_000_000_000


def skeleton(size: str) -> nn.Module:
    """Llama's tensors by its names, on meta: nothing is computed here, so no forward is needed."""
    vocabulary, hidden, wide, layers, heads, shared = SHAPES[size]
    narrow = hidden // heads * shared

    def linear(columns: int, rows: int) -> nn.Linear:
        return nn.Linear(columns, rows, bias=False)

    def layer() -> nn.ModuleDict:
        attention = {
            "q_proj": linear(hidden, hidden),
            "k_proj": linear(hidden, narrow),
            "v_proj": linear(hidden, narrow),
            "o_proj": linear(hidden, hidden),
        }
        mlp = {"gate_proj": linear(hidden, wide), "up_proj": linear(hidden, wide), "down_proj": linear(wide, hidden)}
        return nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict(attention),
                "mlp": nn.ModuleDict(mlp),
                "input_layernorm": nn.RMSNorm(hidden),
                "post_attention_layernorm": nn.RMSNorm(hidden),
            }
        )

    with torch.device("meta"):
        body = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, hidden),
                "layers": nn.ModuleList(layer() for _ in range(layers)),
                "norm": nn.RMSNorm(hidden),
            }
        )
        return nn.ModuleDict({"model": body, "lm_head": linear(hidden, vocabulary)})


def drawn() -> Iterator[np.ndarray[Any, Any]]:
    """Bytes of bfloat16 numbers of standard deviation 0.02: on a GPU all drawn, on a CPU pieces that come again."""
    if torch.cuda.is_available():
        generator = torch.Generator("cuda").manual_seed(0)
        host = torch.empty(1 << 24, dtype=torch.bfloat16, pin_memory=True)
        while True:
            host.copy_(torch.randn(len(host), dtype=torch.bfloat16, device="cuda", generator=generator).mul_(0.02))
            yield host.view(torch.uint8).numpy()
    rng = np.random.default_rng(0)
    # a million numbers in scales that alternate: drawing 8e9 normals would take longer than all that is measured
    noise = torch.from_numpy(rng.standard_normal(1 << 20, np.float32)) * 0.02
    pieces = [(noise * float(rng.uniform(0.5, 1.5))).bfloat16().view(torch.uint8).numpy() for _ in range(32)]
    while True:
        yield pieces[int(rng.integers(len(pieces)))]


def write(folder: Path, size: str) -> None:
    """Random weights of standard deviation 0.02 in bfloat16, sharded, with a config that transformers reads."""
    tensors = [SinkTensor(n, "BF16", tuple(p.shape)) for n, p in skeleton(size).named_parameters()]
    folder.mkdir(parents=True)
    pieces = drawn()
    for layout in safetensors.layout(tensors, shard_size=SHARD):
        with (folder / layout.name).open("wb") as file:
            for segment in layout.segments:
                if isinstance(segment, Fixed):
                    file.write(segment.data)
                    continue
                assert isinstance(segment, Slot)
                left = segment.nbytes
                if "norm" in segment.tensor:  # ones: with noise there the loss hardly depends on the rest
                    file.write(torch.ones(left // 2, dtype=torch.bfloat16).view(torch.uint8).numpy().data)
                    continue
                while left:
                    piece = next(pieces)[:left]
                    file.write(piece.data)
                    left -= piece.nbytes
    vocabulary, hidden, wide, layers, heads, shared = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config))


def ours(folder: Path, size: str, kind: str, device: str) -> dict[str, Any]:
    model = skeleton(size)
    start = time.perf_counter()
    load_quantizing(model, folder, kind, device=device)  # type: ignore[arg-type]
    return {"seconds": time.perf_counter() - start, "bytes": model_sizes(model).bytes, "gpu": gpu_peak(device)}


def theirs(folder: Path, kind: str, device: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**how), device_map={"": device}, dtype=torch.bfloat16
    )
    if device != "cpu":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "bytes": model.get_memory_footprint(), "gpu": gpu_peak(device)}


def gpu_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device != "cpu" else 0


def report(name: str, done: Run, idle: int) -> None:
    found = json.loads(done.out.strip().splitlines()[-1])
    above = done.anonymous - idle
    model, more = found["bytes"], above - found["bytes"]
    host = f"peak {above / 1e9:6.2f} GB of host memory (model {'+' if more > 0 else '-'} {abs(more) / 1e9:.2f})"
    gpu = f"GPU peak {found['gpu'] / 1e9:.2f} GB"
    print(f"{name:14} {found['seconds']:8.1f} s  model {model / 1e9:6.2f} GB  {host}  {gpu}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["idle", "ours", "theirs"])
    given = parser.parse_args()
    if given.only == "idle":
        if given.device != "cpu":
            torch.zeros(1, device=given.device)
        time.sleep(0.5)
    elif given.only:
        print(
            json.dumps(
                ours(given.folder, given.size, given.kind, given.device)
                if given.only == "ours"
                else theirs(given.folder, given.kind, given.device)
            )
        )
    if given.only:
        return
    if not (given.folder / "config.json").is_file():
        write(given.folder, given.size)
    command = [
        sys.executable,
        "-m",
        "benchmarks.quantize_load",
        "--size",
        given.size,
        "--folder",
        str(given.folder),
        "--kind",
        given.kind,
        "--device",
        given.device,
        "--only",
    ]
    idle = run([*command, "idle"]).anonymous
    report("tensorkeep", run([*command, "ours"]), idle)
    if given.device != "cpu" and all(
        importlib.util.find_spec(n) for n in ("transformers", "bitsandbytes", "accelerate")
    ):
        report("transformers", run([*command, "theirs"]), idle)


if __name__ == "__main__":
    main()
