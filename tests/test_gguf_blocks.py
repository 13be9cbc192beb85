"""A quantized GGUF is, tensor by tensor, what llama.cpp's own llama-quantize makes of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read
from tensorkeep.storage.record import BLOCK_TYPES
from tests.test_gguf_writing import MODELS, model

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

# sizes that are no multiples of a block of 32, of llama.cpp's tiles of 32 rows, or of a k-quant's 256
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "odd vocabulary": ("llama", {"vocab_size": 97}),
    "odd vocabulary, untied": ("llama", {"vocab_size": 97, "tie_word_embeddings": False}),
    "48 wide": ("llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "32 wide": ("qwen2", {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}),
    "rows of 80": ("qwen3", {"intermediate_size": 80}),
    "experts of 80": ("mixtral", {"intermediate_size": 80}),
    "288 wide": ("llama", {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}),
}
CASES = {**{name: (name, {}) for name in MODELS}, **ODD}


def as_llama_quantize(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type that llama-quantize --pure gives a tensor: llama-quant.cpp's names, and what odd rows fall back to."""
    allowed = len(shape) > 1 and name.endswith("weight") and "_norm.weight" not in name
    if not allowed or "ffn_gate_inp.weight" in name:
        return "F32"
    return kind if shape[-1] % BLOCK_TYPES[kind][0] == 0 else "F16"


def tensors_of(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("case", CASES)
def test_types_and_bytes_are_those_of_llama_quantize(case: str, tmp_path: Path) -> None:
    """Its bytes are the gguf package's: both were equal for these models and types (benchmarks/results/convert.md)."""
    name, changes = CASES[case]
    model(tmp_path / "hf", name, **changes)
    wide = tmp_path / "wide.gguf"
    convert(make_plan([read(tmp_path / "hf")], "gguf", dtype="F32"), str(wide), "gguf")
    source = tensors_of(wide)
    for kind in BLOCK_TYPES:
        out = tmp_path / f"{kind}.gguf"
        convert(make_plan([read(tmp_path / "hf")], "gguf", dtype=kind), str(out), "gguf")
        found = tensors_of(out)
        assert set(found) == set(source)
        for tensor, held in source.items():
            wanted = as_llama_quantize(tensor, held.data.shape, kind)
            assert (tensor, found[tensor].tensor_type.name) == (tensor, wanted)
            data = gguf.quantize(held.data, gguf.GGMLQuantizationType[wanted])
            assert np.array_equal(found[tensor].data.view(np.uint8), data.view(np.uint8)), tensor


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_quantized_file_says_what_llama_cpp_asks_of_it(kind: str, tmp_path: Path) -> None:
    model(tmp_path / "hf", "llama")
    out = tmp_path / "m.gguf"
    convert(make_plan([read(tmp_path / "hf")], "gguf", dtype=kind), str(out), "gguf")
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert all(int(t.data_offset) % gguf.GGUF_DEFAULT_ALIGNMENT == 0 for t in reader.tensors)
