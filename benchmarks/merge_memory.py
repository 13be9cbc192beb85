"""Time and anonymous memory of a merge: `python -m benchmarks.merge_memory [--gigabytes 1.36] [--dir FOLDER]`.

Writes a bf16 base of Llama's shape and an adapter of rank 16 on every linear, as PEFT saves one, and lets `tensorkeep
merge` add it in a process of its own. Printed: seconds of wall and processor, the peak of RssAnon.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.convert import build, shapes
from benchmarks.measure import run, versions

RANK = 16


def write_adapter(folder: Path, nbytes: int) -> None:
    """Write random A and B for every linear of the base that `build` writes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (*_, rows, columns) in ((n, s) for n, s in shapes(nbytes).items() if n.endswith("_proj.weight")):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}), encoding="utf-8")


def main() -> None:
    """Write base and adapter, merge, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.36)
    parser.add_argument("--dir", type=Path, default=Path("build/bench-merge"))
    given = parser.parse_args()
    nbytes, base, adapter, out = int(given.gigabytes * 1e9), *(given.dir / n for n in ("base", "adapter", "merged"))
    build(base, nbytes)
    write_adapter(adapter, nbytes)
    command = [sys.executable, "-m", "tensorkeep", "merge", str(base), str(adapter), str(out), "--overwrite", "--quiet"]
    done = run(command)
    held = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(versions("torch", "tensorkeep"))
    print(f"{held / 1e9:.2f} GB: {done.wall:.1f} s ({done.cpu:.1f} s of processors), {done.anonymous / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
