"""How fast quantized weights become floats on one core, and how much memory that takes.

    python -m benchmarks.dequantize                  # every kind, one tensor of about 64 M elements, to bf16 and fp32
    python -m benchmarks.dequantize --kind mxfp4 --elements 16000000

A file of one weight with random codes is written to a temporary folder, opened, and streamed as `convert --dtype`
streams it, without writing: GB/s are of output, by the time that one thread spent computing. Memory is the peak of the
process over what it held before, measured in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("fp8-block", "fp8-channel", "int8-channel", "mxfp4", "nvfp4", "gptq", "awq", "pack-quantized", "nf4")
SPELLED = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int32": "I32"}


def tensors(kind: str, elements: int) -> dict[str, Any]:
    """One weight of random codes, 4096 columns wide (2880 for experts), by stored name."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    k = 4096
    n = max(elements // k // 128, 1) * 128
    scale = rng.random((n // 128, k // 128), np.float32)
    e4m3 = ml_dtypes.float8_e4m3fn

    def integers(*shape: int) -> Any:
        return rng.integers(-(2**31), 2**31 - 1, shape, np.int32)

    if kind == "fp8-block":
        return {"m.weight": rng.integers(0, 127, (n, k), np.uint8).view(e4m3), "m.weight_scale_inv": scale}
    if kind == "fp8-channel":
        codes = rng.integers(0, 127, (n, k), np.uint8).view(e4m3)
        return {"m.weight": codes, "m.weight_scale": rng.random((n, 1), np.float32)}
    if kind == "int8-channel":
        return {"m.weight": rng.integers(-127, 127, (n, k), np.int8), "m.weight_scale": rng.random((n, 1), np.float32)}
    if kind == "mxfp4":
        experts, out, groups = max(elements // (5760 * 2880), 1), 5760, 90
        blocks = rng.integers(0, 256, (experts, out, groups, 16), np.uint8)
        return {"m.gate_up_proj_blocks": blocks, "m.gate_up_proj_scales": blocks[..., 0] % 8 + np.uint8(116)}
    if kind == "nvfp4":
        some = rng.random((n, k // 16), np.float32).astype(e4m3)
        codes = rng.integers(0, 256, (n, k // 2), np.uint8)
        return {"m.weight_packed": codes, "m.weight_scale": some, "m.weight_global_scale": np.ones(1, np.float32)}
    groups = k // 128
    half = rng.random((groups, n), np.float32).astype(np.float16)
    if kind == "gptq":
        return {"m.qweight": integers(k // 8, n), "m.qzeros": integers(groups, n // 8), "m.scales": half}
    if kind == "awq":
        return {"m.qweight": integers(k, n // 8), "m.qzeros": integers(groups, n // 8), "m.scales": half}
    if kind == "pack-quantized":
        shape = np.array([n, k], np.int32)
        return {"m.weight_packed": integers(n, k // 8), "m.weight_scale": half.T.copy(), "m.weight_shape": shape}
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]})
    return {
        "m.weight": rng.integers(0, 256, (n * k // 2, 1), np.uint8),
        "m.weight.absmax": rng.random(n * k // 64, np.float32),
        "m.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state.encode(), np.uint8),
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a safetensors file, one tensor after the other."""
    header, at = {}, 0
    for name, value in found.items():
        dtype = SPELLED[value.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in found.values():
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def measure(path: str, dtype: str) -> dict[str, float]:
    """Stream every weight of a file three times; the fastest counts."""
    from tensorkeep.conversion.dequantizing import decoded
    from tensorkeep.formats.view import read

    view = decoded(read(path), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    seconds, done = [], 0
    for _ in range(3):
        started, done = time.process_time(), 0
        for name in view:
            for piece in view.stream(name):
                done += len(piece)
        seconds.append(time.process_time() - started)
    return {"output_mb": done / 1e6, "gb_per_s": done / min(seconds) / 1e9, "memory_mb": (peak() - before) / 1e6}


def peak() -> int:
    """The most bytes that this process has held."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print one line a kind and dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, help="this kind alone")
    parser.add_argument("--elements", type=int, default=64_000_000, help="of the weight (default 64 M)")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.file:
        print(json.dumps(measure(asked.file, asked.dtype)))
        return
    print("| kind | to | GB/s of output | output, MB | codes, MB | memory, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for kind in [asked.kind] if asked.kind else KINDS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write(path, tensors(kind, asked.elements))
            for dtype in ("BF16", "F32"):
                words = [sys.executable, "-m", "benchmarks.dequantize", "--file", str(path), "--dtype", dtype]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found, codes = json.loads(done.stdout), path.stat().st_size / 1e6
                print(
                    f"| {kind} | {dtype} | {found['gb_per_s']:.2f} | {found['output_mb']:.0f} | {codes:.0f} "
                    f"| {found['memory_mb']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
