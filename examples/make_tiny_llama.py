"""Write examples/tiny-llama: a two-layer Llama with seeded random weights, for the README's commands and the tests.

python examples/make_tiny_llama.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.formats.view import read

HIDDEN, INTER, VOCAB, HEADS, KV, LAYERS = 32, 64, 128, 4, 2, 2


def tensors() -> dict[str, np.ndarray]:
    """Weights by hf name, spread as trained ones are: rows of different size, norm gains off 1."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        scale = np.exp(0.4 * random.standard_normal((rows, 1)))
        return (scale * random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(ml_dtypes.bfloat16)

    def gain() -> np.ndarray:
        return (1 + 0.2 * random.standard_normal(HIDDEN)).astype(ml_dtypes.bfloat16)

    out = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": gain()}
    head = HIDDEN // HEADS
    for n in range(LAYERS):
        layer = {
            "self_attn.q_proj": matrix(HIDDEN, HIDDEN),
            "self_attn.k_proj": matrix(KV * head, HIDDEN),
            "self_attn.v_proj": matrix(KV * head, HIDDEN),
            "self_attn.o_proj": matrix(HIDDEN, HIDDEN),
            "mlp.gate_proj": matrix(INTER, HIDDEN),
            "mlp.up_proj": matrix(INTER, HIDDEN),
            "mlp.down_proj": matrix(HIDDEN, INTER),
            "input_layernorm": gain(),
            "post_attention_layernorm": gain(),
        }
        out |= {f"model.layers.{n}.{name}.weight": value for name, value in layer.items()}
    return out


def main(folder: Path) -> None:
    header, data, at = {}, b"", 0
    for name, value in tensors().items():
        raw = value.tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, at + len(raw)]}
        data, at = data + raw, at + len(raw)
    text = json.dumps(header).encode()
    plain = folder.with_suffix(".plain")
    plain.mkdir(parents=True)
    (plain / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }
    (plain / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    convert(make_plan([read(plain)], "hf"), str(folder), "hf", overwrite=True)
    for file in plain.iterdir():
        file.unlink()
    plain.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/tiny-llama"))
