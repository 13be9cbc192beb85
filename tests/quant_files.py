"""Write quantized files for tests from the formats' descriptions, with other code than the reader's.

The tables are derived here once more: NF4 from the quantiles of the normal distribution (QLoRA, section 3), FP4 from
the meaning of its bits. Codes are found by trying all sixteen.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from tensorkeep.diagnosis.checks import CODES
from tensorkeep.diagnosis.evidence import opening
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding

SHARED = Path(__file__).parents[2] / "shared/fixtures"
QLORA, MINIMIND = SHARED / "qlora/open", SHARED / "minimind/open"
needs_qlora = pytest.mark.skipif(not QLORA.is_dir(), reason="the shared qlora fixtures are not here")
needs_minimind = pytest.mark.skipif(not MINIMIND.is_dir(), reason="the shared minimind fixtures are not here")
MINE = [c for c in CODES if c[0] in "QAER"]
Tensors = dict[str, Any]
Array = np.ndarray[Any, Any]
NAMES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def nf4_table() -> Array:
    """Quantiles of N(0, 1): seven below zero, zero, eight above, scaled to reach 1."""
    offset, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*above, 0.0, *below]))
    return (levels / levels.max()).astype(np.float32)


def fp4_table() -> Array:
    """Sign, two bits of exponent, one of mantissa, as bitsandbytes orders them, the largest being 1."""
    magnitudes = [0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
    return np.array([*magnitudes, *(-m for m in magnitudes)], np.float32)


def four_bit(
    weight: Array,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = False,
    storage: str = "uint8",
    nested_block: int = 256,
) -> dict[str, Array]:
    """The tensors of one 4-bit weight by suffix ("" are the codes)."""
    table = nf4_table() if kind == "nf4" else fp4_table()
    flat = weight.astype(np.float32).reshape(-1)
    pieces = [flat[at : at + block] for at in range(0, flat.size, block)]
    absmax = np.array([np.abs(p).max() for p in pieces], np.float32)
    unit = np.concatenate([p / m if m > 0 else p * 0 for p, m in zip(pieces, absmax)])
    codes = np.array([int(np.abs(table - u).argmin()) for u in unit], np.uint8)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    packed = (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)
    width = np.dtype(storage).itemsize if storage != "bfloat16" else 2
    packed = np.append(packed, np.zeros(-packed.size % width, np.uint8))
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    out = {"quant_map": table}
    if nested:
        offset = float(absmax.mean(dtype=np.float32))
        levels = np.linspace(-1, 1, 256, dtype=np.float32)
        parts = [absmax[at : at + nested_block] - np.float32(offset) for at in range(0, absmax.size, nested_block)]
        outer = np.array([max(np.abs(p).max(), 1e-12) for p in parts], np.float32)
        out["absmax"] = np.concatenate(
            [[np.abs(levels - v / o).argmin() for v in p] for p, o in zip(parts, outer)]
        ).astype(np.uint8)
        out |= {"nested_absmax": outer, "nested_quant_map": levels}
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
    else:
        out["absmax"] = absmax
    out[f"quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {"": _typed(packed, storage), **out}


def _typed(packed: Array, storage: str) -> Array:
    if storage == "bfloat16":
        import ml_dtypes

        return packed.view(ml_dtypes.bfloat16).reshape(-1, 1)
    return packed.view(storage).reshape(-1, 1)


def decoded(parts: Mapping[str, Array]) -> Array:
    """The values of `four_bit`'s tensors, element by element in Python."""
    (key,) = [k for k in parts if k.startswith("quant_state")]
    state = json.loads(bytes(parts[key]))
    count = int(np.prod(state["shape"]))
    bytes_ = parts[""].reshape(-1).view(np.uint8)
    out = np.empty(count, np.float32)
    for i in range(count):
        code = bytes_[i // 2] >> 4 if i % 2 == 0 else bytes_[i // 2] & 15
        at = i // state["blocksize"]
        if "nested_absmax" in parts:
            scale = (
                parts["nested_quant_map"][parts["absmax"][at]] * parts["nested_absmax"][at // state["nested_blocksize"]]
            )
            scale = np.float32(scale + np.float32(state["nested_offset"]))
        else:
            scale = parts["absmax"][at]
        out[i] = parts["quant_map"][code] * scale
    return out.reshape(state["shape"])


def named(weight: str, parts: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{weight}.{k}" if k else weight: v for k, v in parts.items()}


def int8(weight: Array) -> tuple[Array, Array]:
    """bitsandbytes' int8: codes by row and SCB, the largest magnitude of each row."""
    top = np.abs(weight).max(1).astype(np.float32)
    return np.rint(weight * (127 / np.maximum(top, 1e-30))[:, None]).astype(np.int8), top


def averaged_bytes(packed: Array, decay: float, updates: int, live: Array | None = None) -> Array:
    """`e = d*e + (1-d)*m` in float32, written back into bytes by truncation, as averaging helpers do."""
    average = packed.astype(np.float32)
    model = (packed if live is None else live).astype(np.float32)
    for _ in range(updates):
        average = (
            np.trunc(np.float32(decay) * average + np.float32(1 - decay) * model)
            .astype(packed.dtype)
            .astype(np.float32)
        )
    return average.astype(packed.dtype)


def write(
    folder: Path,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """An hf folder, the safetensors file spelled out here; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at, blobs = 0, []
    for name, value in tensors.items():
        data = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": NAMES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        blobs.append(data)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))
    return str(folder)


# -- models and what the checks say of them ---------------------------------------------------------------------------


def findings(
    checkpoint: str | Path, reference: str | Path | None = None, codes: str = "QAER"
) -> tuple[list[Finding], set[str]]:
    """The findings of these checks, and the codes that could not be decided."""
    case = opening.open_case(str(checkpoint), None if reference is None else str(reference))
    opening.compare_sides(case)
    out: list[Finding] = []
    undecided = set()
    for code in MINE:
        if code[0] in codes:
            try:
                out += importlib.import_module(CODES[code]).check(case)
            except Inconclusive:
                undecided.add(code)
    return out, undecided


def said(found: list[Finding], severity: str = "error") -> set[str]:
    return {f.code for f in found if f.severity == severity}


def gaussian(shape: tuple[int, ...], seed: int, spread: float = 0.02) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def model(seed: int = 0, layers: int = 2, columns: int = 96) -> Tensors:
    """A few matrices, rows of different lengths as training leaves them, and a norm."""
    out: Tensors = {"model.norm.weight": gaussian((columns,), seed) + 1}
    for layer in range(layers):
        for i, name in enumerate(("self_attn.q_proj", "self_attn.o_proj")):
            lengths = np.random.default_rng(seed + 7 * layer + i).uniform(0.5, 2, (columns, 1)).astype(np.float32)
            out[f"model.layers.{layer}.{name}.weight"] = gaussian((columns, columns), seed + 100 * layer + i) * lengths
    return out


def matrices(tensors: Tensors) -> list[str]:
    return [n for n, t in tensors.items() if t.ndim == 2]


def quantize(tensors: Tensors, kind: str = "nf4", **options: Any) -> Tensors:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            out[name] = tensor
        elif kind == "int8":
            out[name], out[name.removesuffix("weight") + "SCB"] = int8(tensor)
        else:
            out |= named(name, four_bit(tensor, kind, **options))
    return out
