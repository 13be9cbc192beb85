"""HF -> DCP and DCP -> HF of a Llama-shaped bf16 checkpoint, beside copying the bytes and beside the peers.

    python -m benchmarks.convert [--sizes 0.5 2 8] [--dir DIR] [--rounds 3] [--no-peers]

Rows: `cp` copies the same bytes and fsyncs them (the floor); tensorkeep with its read-back proof (the default), and
the seconds of the proof alone; (b) transformers' from_pretrained + dcp.save, and dcp_to_torch_save back; (c) torch's
own Hugging Face storage reader and writer. Each row is a whole process, start-up included, each round cold and warm.
GB/s is of the checkpoint's bytes; that of `cp` is the disk's raw rate. On a large machine, without the peers:

    python -m benchmarks.convert --sizes 16 --no-peers --dir DIR
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run as a file: beside it lies inspect.py, which must not stand in for the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

import argparse
import json
import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks.measure import Run, forget, remember, run, versions
from tensorkeep.conversion.writing import write_all
from tensorkeep.formats.safetensors import layout
from tensorkeep.storage.layout import Fixed, SinkTensor
from tensorkeep.storage.spreading import cores

HIDDEN, INTER, VOCAB, HEADS, KV = 2048, 8192, 32000, 32, 8

CP = """
import os, shutil, sys
src, out = sys.argv[1:]
shutil.copytree(src, out)
for name in os.listdir(out):
    handle = os.open(os.path.join(out, name), os.O_RDONLY); os.fsync(handle); os.close(handle)
"""
HF_TO_DCP = """
import sys, torch, transformers
import torch.distributed.checkpoint as dcp
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
dcp.save(model.state_dict(), storage_writer=dcp.FileSystemWriter(sys.argv[2], thread_count=8), no_dist=True)
"""
DCP_TO_HF = """
import sys, torch, transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2] + ".pt")
config = transformers.AutoConfig.from_pretrained(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.load_state_dict(torch.load(sys.argv[2] + ".pt", map_location="cpu"))
model.save_pretrained(sys.argv[2])
import os; os.unlink(sys.argv[2] + ".pt")
"""
STORAGE = """
import sys, torch, json, os
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
src, out, way = sys.argv[1:4]
reader = HuggingFaceStorageReader(src) if way == "hf-dcp" else FileSystemReader(src)
md = reader.read_metadata().state_dict_metadata
state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in md.items()}
dcp.load(state, storage_reader=reader, no_dist=True)
if way == "hf-dcp":
    writer = FileSystemWriter(out, thread_count=8)
else:
    index = {k: i % 4 + 1 for i, k in enumerate(sorted(state))}
    writer = HuggingFaceStorageWriter(out, fqn_to_index_mapping=index)
dcp.save(state, storage_writer=writer, no_dist=True)
"""


def shapes(nbytes: int) -> dict[str, tuple[int, ...]]:
    """A Llama of about `nbytes` in bf16: embedding, head, and as many layers as fit."""
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    head = HIDDEN // HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV * head, HIDDEN),
        "self_attn.v_proj": (KV * head, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTER, HIDDEN),
        "mlp.up_proj": (INTER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    per_layer = 2 * sum(int(np.prod(s)) for s in layer.values())
    for n in range(max(1, round((nbytes - 4 * VOCAB * HIDDEN) / per_layer))):
        out |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return out


def build(folder: Path, nbytes: int) -> None:
    """Write the checkpoint: random bf16 of sensible size, shards of at most 1 GB, config.json."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True)
    tensors = [SinkTensor(n, "BF16", s) for n, s in sorted(shapes(nbytes).items())]
    random = np.random.default_rng(0)
    noise = (
        ((random.standard_normal(1 << 22, dtype=np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    )
    for file in layout(tensors, shard_size=10**9):
        with (folder / file.name).open("wb") as stream:
            stream.truncate(file.size)
            for segment in file.segments:
                if isinstance(segment, Fixed):
                    write_all(stream.fileno(), segment.data, segment.start)
                else:
                    for at in range(0, segment.nbytes, len(noise)):
                        write_all(stream.fileno(), noise[: segment.nbytes - at], segment.start + at)
    layers = sum(n.endswith("input_layernorm.weight") for n in shapes(nbytes))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))


def one(name: str, command: list[str], source: Path, sink: Path, cold: bool) -> tuple[str, Run]:
    shutil.rmtree(sink, ignore_errors=True)
    (forget if cold else remember)(source)
    result = run(command, OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    return name, result


def jobs(source: Path, dcp: Path, sink: Path, peers: bool) -> dict[str, dict[str, list[str]]]:
    """List the commands to measure: direction -> name of the row -> command."""
    py, tk = sys.executable, [sys.executable, "-m", "tensorkeep", "convert", "--quiet", "--json"]
    forth = {"cp": [py, "-c", CP, str(source), str(sink)], "tensorkeep": [*tk, str(source), str(sink), "--to", "dcp"]}
    back = {"cp": [py, "-c", CP, str(dcp), str(sink)], "tensorkeep": [*tk, str(dcp), str(sink), "--to", "hf"]}
    if peers:
        forth |= {
            "b from_pretrained + dcp.save": [py, "-c", HF_TO_DCP, str(source), str(sink)],
            "c torch HF reader + dcp.save": [py, "-c", STORAGE, str(source), str(sink), "hf-dcp"],
        }
        back |= {
            "b dcp_to_torch_save + save_pretrained": [py, "-c", DCP_TO_HF, str(dcp), str(sink), str(source)],
            "c torch HF writer": [py, "-c", STORAGE, str(dcp), str(sink), "dcp-hf"],
        }
    return {"HF -> DCP": forth, "DCP -> HF": back}


def table(size: float, place: Path, rounds: int, peers: bool) -> None:
    source, dcp, sink = place / f"hf-{size}", place / f"dcp-{size}", place / "sink"
    build(source, int(size * 1e9))
    if not dcp.exists():
        run([sys.executable, "-m", "tensorkeep", "convert", "--quiet", str(source), str(dcp), "--to", "dcp"])
    largest = max(2 * int(np.prod(s)) for s in shapes(int(size * 1e9)).values())
    print(f"\n### {size} GB (largest tensor {largest / 1e6:.0f} MB), {rounds} rounds, median\n")
    print("| direction | cache | way | wall s | x cp | GB/s | CPU s | anonymous MB | proof s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for direction, rows in jobs(source, dcp, sink, peers).items():
        origin = source if direction.startswith("HF") else dcp
        for cold in (True, False):
            found: dict[str, list[Run]] = {name: [] for name in rows}
            for _ in range(rounds):
                for name, command in rows.items():  # interleaved, so that a slow spell of the disk meets all rows
                    found[name].append(one(name, command, origin, sink, cold)[1])
            floor = statistics.median(r.wall for r in found["cp"])
            for name, runs in found.items():
                wall, cpu = statistics.median(r.wall for r in runs), statistics.median(r.cpu for r in runs)
                shown = ""
                if name == "tensorkeep":
                    shown = f"{statistics.median(json.loads(r.out)['seconds']['prove'] for r in runs):.2f}"
                memory = max(r.anonymous for r in runs) / 1e6
                cells = (
                    f"{wall:.2f}",
                    f"{wall / floor:.2f}",
                    f"{size / wall:.2f}",
                    f"{cpu:.1f}",
                    f"{memory:.0f}",
                    shown,
                )
                print("|", " | ".join((direction, "cold" if cold else "warm", name, *cells)), "|", flush=True)
    shutil.rmtree(sink, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 2.0, 8.0], help="GB")
    parser.add_argument("--dir", type=Path, default=Path("build/bench-convert"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    print(versions("tensorkeep", "torch", "transformers", "safetensors", "numpy") + f"; {cores()} threads")
    for size in arguments.sizes:
        table(size, arguments.dir, arguments.rounds, not arguments.no_peers)


if __name__ == "__main__":
    main()
