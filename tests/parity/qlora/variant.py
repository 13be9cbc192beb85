"""A set of fixtures of another geometry: `python -m tests.parity.qlora.variant DIR`, no block size divides its shapes.

Written by transformers and PEFT; the quantized forms by our encoder, which was compared with bitsandbytes 0.50.2 on
the CPU for shapes like these, bit by bit (`tests/test_quant_encoding.py` does it again where bitsandbytes is there).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import encoding
from tensorkeep.quantization.encoding import Encoding

KINDS = {
    "nf4_dq": Encoding("nf4", 64, True),
    "nf4": Encoding("nf4"),
    "fp4_dq": Encoding("fp4", 64, True),
    "fp4": Encoding("fp4"),
    "int8": Encoding("int8"),
}
GEOMETRY = {
    "vocab_size": 101,
    "hidden_size": 80,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter_lora": {"r": 5, "lora_alpha": 10, "target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "adapter_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
    },
    "adapter_rslora_dora": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
    },
}


def encoded(name: str, weight: np.ndarray, kind: Encoding) -> dict[str, np.ndarray]:
    """The tensors of one quantized weight as bitsandbytes names them."""
    if kind.kind == "int8":
        half = weight.astype(np.float16).astype(np.float32)
        top = np.abs(half).max(1)
        codes = np.rint(half * (np.float32(127) * (np.float32(1) / top))[:, None]).astype(np.int8)
        stem = name.removesuffix("weight")
        return {name: codes, f"{stem}SCB": top, f"{stem}weight_format": np.zeros((), np.uint8)}
    flat = weight.reshape(-1)
    absmax = encoding.absolute_maxima(flat, kind.block)
    codes = encoding.four_bit_codes(flat, absmax, kind.kind, kind.block)
    state: dict[str, Any] = {
        "quant_type": kind.kind,
        "blocksize": kind.block,
        "dtype": "float32",
        "shape": list(weight.shape),
    }
    out = {name: quant_codes.pack_nibbles(codes).reshape(-1, 1), f"{name}.quant_map": encoding.LEVELS[kind.kind]}
    if kind.double:
        eight, outer, offset = encoding.nested(absmax)
        out |= {
            f"{name}.absmax": eight,
            f"{name}.nested_absmax": outer,
            f"{name}.nested_quant_map": encoding.dynamic_map(),
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        out[f"{name}.absmax"] = absmax
    out[f"{name}.quant_state.bitsandbytes__{kind.kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out


def write(
    place: Path, kinds: Collection[str] = tuple(KINDS), adapters: Collection[str] = tuple(ADAPTERS), **geometry: Any
) -> Path:
    """Write the whole set, or some of its quantized forms (nf4_dq among them) and adapters."""
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(5)
    config = transformers.LlamaConfig(**{**GEOMETRY, **geometry})
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(place / "base")
    base = load_file(place / "base" / "model.safetensors")
    linears = [n for n, w in base.items() if w.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = torch.randint(0, config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    io = {"input_ids": ids.numpy()}
    forms: dict[str, dict[str, np.ndarray]] = {"fp32": {}}
    for name in kinds:
        kind = KINDS[name]
        forms[name] = {n: encoding.through(base[n], kind) for n in linears}
        save_file(forms[name], place / f"dequant_{name}.safetensors")
        stored = {k: v for n, w in base.items() for k, v in (encoded(n, w, kind) if n in linears else {n: w}).items()}
        (place / f"quant_{name}").mkdir()
        save_file(stored, place / f"quant_{name}" / "model.safetensors", {"format": "pt"})
        document = json.loads((place / "base" / "config.json").read_text())
        document["quantization_config"] = {"quant_method": "bitsandbytes"}
        (place / f"quant_{name}" / "config.json").write_text(json.dumps(document))

    def fresh(values: dict[str, np.ndarray]) -> Any:
        made = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()
        with torch.no_grad():
            for n, value in values.items():
                made.get_parameter(n).copy_(torch.from_numpy(value))
        return made

    def logits(made: Any) -> np.ndarray:
        with torch.no_grad():
            return made(input_ids=ids).logits.numpy().copy()

    for label in adapters:
        options = ADAPTERS[label]
        tuned = get_peft_model(fresh({}), LoraConfig(task_type="CAUSAL_LM", **options))
        _move(tuned)
        tuned.save_pretrained(place / label)
    for form, values in forms.items():
        io[f"logits.base.{form}"] = logits(fresh(values))
        for label in adapters:
            stem = f"logits.{label.removeprefix('adapter_')}"
            tuned = PeftModel.from_pretrained(fresh(values), str(place / label)).eval()
            io[f"{stem}.adapted.{form}"] = logits(tuned)
            merged = f"{stem}.merged.fp32" if form == "fp32" else f"{stem}.dequant_merged.{form}"
            io[merged] = logits(tuned.merge_and_unload())
    save_file(io, place / "io.safetensors")
    _write_damaged(place, base, linears)
    return place


@torch.no_grad()
def _move(model: Any) -> None:
    """Change an adapter's weights at random, as training would: a new adapter does nothing."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 0.1 * parameter.abs() if "magnitude" in name else 0.02
            parameter.add_(torch.randn_like(parameter) * size)


def _write_damaged(place: Path, base: dict[str, np.ndarray], linears: list[str]) -> None:
    (place / "damaged").mkdir()
    sound = load_file(place / "quant_nf4_dq" / "model.safetensors")
    other = np.random.default_rng(9)
    wrong = dict(sound)
    for name in linears:  # scales of another model of these shapes
        spread = (other.standard_t(4, base[name].shape) * 0.08).astype(np.float32)
        wrong |= {k: v for k, v in encoded(name, spread, KINDS["nf4_dq"]).items() if k != name}
    save_file(wrong, place / "damaged" / "nf4_dq_packed_of_A_absmax_of_B.safetensors")
    averaged = dict(sound)
    for name in linears:
        for _ in range(50):
            moved = averaged[name].astype(np.float32) * np.float32(0.9999) + sound[name].astype(
                np.float32
            ) * np.float32(0.0001)
            averaged[name] = moved.astype(np.uint8)
    save_file(averaged, place / "damaged" / "nf4_dq_ema0.9999_of_packed_bytes.safetensors")
    left = {n: v for n, v in sound.items() if not any(n.startswith(f"{w}.") for w in linears)}
    save_file(left, place / "damaged" / "nf4_dq_quant_state_filtered_out.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
