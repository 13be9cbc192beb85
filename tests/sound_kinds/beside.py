"""Sound variants with a tokenizer, another spelling of the config, an adapter, or fp8 with its scales."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tests.fault_kinds.writing import write
from tests.sound_kinds.variant import variant
from tests.specimens import FP32, Specimen, State

Rng = np.random.Generator


@variant
def tokenizer_beside(m: Specimen, place: Path, rng: Rng) -> Path | None:
    if not m.language:
        return None
    vocab = {f"<w{i}>": i for i in range(m.config["vocab_size"])}
    document = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    return write(
        "hf", m.tensors, place, m.config, {"tokenizer.json": json.dumps(document).encode(), "README.md": b"# model\n"}
    )


@variant
def config_of_other_words(m: Specimen, place: Path, rng: Rng) -> Path:
    """Change what programs change in a config without changing the model: dtype's old name, cache, version, path."""
    config = {k: v for k, v in m.config.items() if k != "dtype"}
    config |= {
        "torch_dtype": m.config["dtype"],
        "use_cache": False,
        "transformers_version": "5.1.0",
        "_name_or_path": "somewhere",
    }
    return write("hf", m.tensors, place, config)


@variant
def adapter_folder(m: Specimen, place: Path, rng: Rng) -> Path | None:
    """Write an adapter as peft does; it is diagnosed against its base."""
    from safetensors.numpy import save_file

    if not m.language:
        return None
    place.mkdir(parents=True)
    state: State = {}
    for name in [*m.role("q", None, "weight"), *m.role("v", None, "weight")]:
        rows, columns = m.tensors[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        state[f"{stem}.lora_A.weight"] = rng.normal(0, 0.1, (4, columns)).astype(FP32)
        state[f"{stem}.lora_B.weight"] = rng.normal(0, 0.01, (rows, 4)).astype(FP32)
    save_file(state, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": "base",
    }
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@variant
def fp8_with_scales(m: Specimen, place: Path, rng: Rng) -> Path | None:
    """Write block-quantized fp8 as DeepSeek and Qwen ship it, with scales and a config that says so."""
    if m.name != "qwen3":
        return None
    state: State = {}
    for name, tensor in m.tensors.items():
        if name not in m.matrices:
            state[name] = tensor
            continue
        values = tensor.astype(FP32)
        scale = np.float32(np.abs(values).max() / 448)
        state[name] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        state[f"{name}_scale_inv"] = np.full((-(-len(values) // 128), -(-values.shape[1] // 128)), scale, FP32)
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return write("hf", state, place, {**m.config, "quantization_config": quantized})
