"""Tiny GGUF models, written with the gguf package as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.conversion import execution as conversion
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats import view

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, VOCAB, LAYERS = 64, 4, 2, 16, 96, 96, 2


def shapes(bias: bool = False, norms: bool = False) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        layer: dict[str, tuple[int, ...]] = {
            "attn_q.weight": (q, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_output.weight": (HIDDEN, q),
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (WIDE, HIDDEN),
            "ffn_up.weight": (WIDE, HIDDEN),
            "ffn_down.weight": (HIDDEN, WIDE),
        }
        if bias:
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if norms:
            layer |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        out |= {f"blk.{n}.{name}": shape for name, shape in layer.items()}
    return out


def blocks(data: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """The blocks of a matrix; of a type that the package only reads, blocks of any bytes."""
    try:
        return np.asarray(gguf.quantize(data, kind))
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(data.shape, kind)
        return np.random.default_rng(data.size).integers(0, 256, shape, np.uint8)


def write_model(
    path: Path,
    arch: str = "llama",
    kind: str = "Q8_0",
    tensors: dict[str, tuple[int, ...]] | None = None,
    theta: float = 500000.0,
    extra: Callable[[Any], None] | None = None,
    freqs: list[float] | None = None,
) -> Path:
    """A tiny model as llama.cpp's converter would write it; matrices quantized to `kind`, the rest F32."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    if extra:
        extra(writer)
    for name, shape in (tensors or shapes()).items():
        data = rng.standard_normal(shape).astype(np.float32) * (0.3 if len(shape) > 1 else 1.0)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, data)
        elif kind == "F16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, blocks(data, quantized), raw_dtype=quantized)
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.array(freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def to_hf(source: Path, out: Path, **options: Any) -> view.StateView:
    conversion.convert(make_plan([view.read(source)], "hf", **options), str(out), "hf")
    return view.read(out)


def rewritten(
    source: Path, out: Path, metadata: Mapping[str, tuple[Any, Any]], tensors: Mapping[str, Any] | None = None
) -> None:
    """A GGUF file again, written by llama.cpp's own package, with more or other metadata, and more tensors."""
    held = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, held.fields["general.architecture"].contents())
    for key, field in held.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in metadata:
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for key, (value, kind) in metadata.items():
        writer.add_key_value(key, value, kind)
    for tensor in held.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type, raw_shape=tensor.data.shape)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
