"""How much memory a mixture of experts takes with its linears and experts in 4 bits: counted, and measured smaller.

    OMP_NUM_THREADS=1 python -m benchmarks.moe_memory          # about a minute, 1 GB of memory, 0.3 GB of disk

The first table counts Qwen3-30B-A3B's shape on the meta device, tensor by tensor, without a weight. The second one is
measured: the same architecture scaled down, written in bfloat16, loaded as `train language` loads it with
`quantize_backbone: nf4`, LoRA put on, one training step. What the model holds is compared with the count byte for byte;
peaks are the process's own (VmHWM over what it held after its imports), in a process for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Qwen/Qwen3-30B-A3B's config.json, the fields that its size depends on
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SMALL = {
    **QWEN3_30B_A3B,
    "vocab_size": 8192,
    "hidden_size": 1024,
    "moe_intermediate_size": 384,
    "num_experts": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
}
RANK, BLOCK, NESTED = 16, 64, 256
TABLES = 4 * (16 + 256)  # the values of the codes, and of the scales' codes


def coded(elements: int) -> int:
    """Bytes of one matrix in nf4 with double quantization, without its tables."""
    blocks = -(-elements // BLOCK)
    return (elements + 1) // 2 + blocks + 4 * -(-blocks // NESTED) + 4


def hollow(config: dict[str, Any]) -> Any:
    """The model of a config on the meta device."""
    import torch

    from tensorkeep.language.start import from_config

    with torch.device("meta"):
        return from_config(dict(config), 0)


def counted(config: dict[str, Any]) -> dict[str, int]:
    """Parameters and bytes of a config's model, counted without a weight."""
    from tensorkeep.quantization.linear_layers import linear_layers, stacked_parameters
    from tensorkeep.quantization.replacing import left_wide, selected

    model = hollow(config)
    wide = left_wide(model)
    piles = [(f"{path}.{name}", m.get_parameter(name)) for path, m, name in stacked_parameters(model)]
    linears = [(n, m) for n, kind, m in linear_layers(model) if kind == "linear" and selected(n, ["*"], wide)]
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for _, p in piles)
    dense = sum(m.weight.numel() for _, m in linears)
    rest = total - experts - dense
    in_codes = sum(coded(m.weight.numel()) + TABLES + 16 for _, m in linears)
    in_piles = sum(p.shape[0] * coded(p[0].numel()) + TABLES for _, p in piles)
    low_rank = sum(RANK * (m.in_features + m.out_features) for _, m in linears)
    on_experts = sum(RANK * p.shape[0] * (p.shape[1] + p.shape[2]) for _, p in piles)
    widest = max(p[0].numel() for _, p in piles)
    return {
        "parameters": total,
        "experts": experts,
        "linears": dense,
        "rest": rest,
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "wide_experts": 4 * experts + in_codes + 4 * rest,
        "coded": in_piles + in_codes + 4 * rest,
        "coded_linears": in_codes,
        "coded_experts": in_piles,
        "lora": 16 * low_rank,
        "lora_experts": 16 * on_experts,
        "expert": 4 * widest,
        "layer": 2 * 3 * config["num_experts"] * config["hidden_size"] * config["moe_intermediate_size"],
    }


def held(model: Any) -> int:
    """Bytes of all parameters and buffers that files hold, each storage once."""
    sizes = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def peak() -> int:
    """The most memory that this process has held so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def write(folder: Path, config: dict[str, Any]) -> None:
    """A model of a config in bfloat16 under the hub's names, a tensor at a time."""
    import torch
    from safetensors.torch import save_file

    from tensorkeep.models.names import model_names

    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: (torch.randn(s, generator=generator) * 0.02 + (len(s) == 1)).bfloat16()
        for n, s in model_names(config).file.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def child(folder: str, what: str) -> dict[str, int]:
    """Load the folder in 4 bits and train one step; bytes held and peaks over what the imports hold."""
    import torch

    from tensorkeep.adapters.lora import add_lora
    from tensorkeep.formats.view import read
    from tensorkeep.language._bases import in_codes

    view = read(folder)
    tiny = torch.nn.Linear(2, 2)
    tiny(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()  # which imports more than it says
    hollow(view.config or {})
    before = peak()
    model: Any = in_codes(view, hollow, "nf4", torch.device("cpu"))
    out = {"held": held(model), "load": peak() - before}
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if what == "experts" else []
    add_lora(model, "all-linear", r=RANK, parameters=parameters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(256)[None] % view.config["vocab_size"]  # type: ignore[index]
    model.train()
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    return {**out, "step": peak() - before}


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(*given.child)))
        return 0
    big = counted(QWEN3_30B_A3B)
    print("## Qwen3-30B-A3B, counted\n\n| | elements | GB |\n|---|---:|---:|")
    rows = [
        ("all parameters, float32", big["parameters"], big["float32"]),
        ("all parameters, bfloat16", big["parameters"], big["bfloat16"]),
        ("linears in nf4, experts and the rest in float32", big["parameters"], big["wide_experts"]),
        ("**linears and experts in nf4, the rest in float32**", big["parameters"], big["coded"]),
        ("of these: experts", big["experts"], big["coded_experts"]),
        ("of these: linears", big["linears"], big["coded_linears"]),
        ("of these: embedding, head, routers, norms", big["rest"], 4 * big["rest"]),
        (f"LoRA r {RANK} on linears, with gradients and AdamW", big["lora"] // 16, big["lora"]),
        (f"LoRA r {RANK} on experts as well", big["lora_experts"] // 16, big["lora_experts"]),
        ("one expert's widest matrix in float32, while loading", big["expert"] // 4, big["expert"]),
        ("all experts of a layer in bfloat16, where a forward needs them at once", big["layer"] // 2, big["layer"]),
    ]
    for name, elements, size in rows:
        print(f"| {name} | {elements:,} | {size / 1e9:.2f} |")
    share = big["coded_experts"] / big["experts"]
    print(f"\nExperts take {share:.4f} byte an element.\n\n## Scaled down, measured\n")
    small = counted(SMALL)
    with tempfile.TemporaryDirectory() as made:
        write(Path(made), SMALL)
        found = {}
        for what in ("linears", "experts"):
            command = [sys.executable, "-m", "benchmarks.moe_memory", "--child", made, what]
            fixed = {
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
            }  # freed memory goes back: peaks are of what is held
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=fixed)
            found[what] = json.loads(done.stdout.splitlines()[-1])
    print("| | MB |\n|---|---:|")
    print(f"| all {small['parameters']:,} parameters in float32 | {small['float32'] / 1e6:.1f} |")
    print(f"| counted in nf4 | {small['coded'] / 1e6:.3f} |")
    print(f"| held after loading | {found['linears']['held'] / 1e6:.3f} |")
    print(f"| peak of loading over the imports | {found['linears']['load'] / 1e6:.1f} |")
    print(f"| peak of one step of 256 tokens, LoRA on linears | {found['linears']['step'] / 1e6:.1f} |")
    print(f"| peak of one step of 256 tokens, LoRA on experts as well | {found['experts']['step'] / 1e6:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
