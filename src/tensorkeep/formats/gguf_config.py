"""Make a transformers config from a GGUF file's metadata and shapes.

GGUF keeps floats as float32 and RoPE scaling of the Llama 3 kind as a tensor of factors: both are brought back to the
numbers that the original config.json held. Both `rope_theta` (transformers 4) and `rope_parameters` (5) are written,
since either version silently falls back to 10000 without its own.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.gguf_families import (
    LONG,
    SHORT,
    attention_factor,
    gemma_config,
    local_theta,
    refuse_windows,
)
from tensorkeep.storage.record import DTYPES, TensorRecord

# llama.cpp's architecture -> transformers' model type and class
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
FACTORS = "rope_freqs.weight"
# shapes say them, too
_SHAPED = ("vocab_size", "attention.value_length", "attention.key_length", "embedding_length_out")
_MIXTRAL = ("mixtral", "MixtralForCausalLM")  # llama.cpp calls it llama, with experts
# what llama.cpp's converter assumed for the scaling of Llama 3, whose numbers it does not store
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Fields:
    """The metadata of one architecture, read with its types checked: the file may hold anything."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def get(self, key: str) -> Any:
        """Return the raw value of `ARCHITECTURE.key`, None where it is missing."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: float | None = None, least: float = 0) -> float:
        """Return a finite number not below `least`; an array of equal numbers counts as one."""
        value = self.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            raise TensorkeepError(f"the metadata gives {_short(value)} for {self.architecture}.{key}", code="C03")
        return value

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number not below `least`."""
        value = self.number(key, default, least)
        if value != int(value) or value >= 1 << 48:
            raise TensorkeepError(f"the metadata gives {value} for {self.architecture}.{key}", code="C03")
        return int(value)


def hf_config(
    metadata: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    factors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Make the config.json that transformers needs for a GGUF file.

    Args:
        metadata: the metadata of the file's header.
        records: its tensors by llama.cpp's names.
        factors: the values of the tensors that scale RoPE's frequencies, by name, where the file has them.

    Returns:
        The config as a document.

    Raises:
        TensorkeepError: C03 for an architecture that is not known here, and where metadata and shapes disagree.

    Example:
        >>> hf_config(view.metadata["gguf"], view.records)["rms_norm_eps"]     # doctest: +SKIP
        1e-05
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise TensorkeepError(
            f"the architecture is {_short(architecture)}; known are {', '.join(_ARCHITECTURES)}", code="C03"
        )
    fields = Fields(metadata, str(architecture))
    experts = fields.whole("expert_count", 0, 0)
    kind, name = _MIXTRAL if architecture == "llama" and experts else _ARCHITECTURES[str(architecture)]
    refuse_windows(kind, fields)
    heads, hidden = fields.whole("attention.head_count"), fields.whole("embedding_length")
    head_dim = fields.whole("attention.key_length", hidden // heads)
    shapes = {n: r.shape for n, r in records.items()}
    kv_heads, layers = fields.whole("attention.head_count_kv", heads), fields.whole("block_count")
    vocabulary = _check_shapes(shapes, heads, hidden, head_dim, kv_heads)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": shortest(fields.number("attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": "output.weight" not in records,
        "attention_bias": "blk.0.attn_q.bias" in records,
        "mlp_bias": "blk.0.ffn_gate.bias" in records,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **_rope(fields, kind, head_dim, factors),
        **_width(fields, kind, experts),
        **special_token_ids(metadata, vocabulary),
        "dtype": _dtype(records),
    }
    return config | gemma_config(kind, fields, config)


class _Asked(dict[str, Any]):
    """Metadata that notes which keys were asked for."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        super().__init__(metadata)
        self.keys_asked = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, and note its key."""
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        """Return a value, and note its key."""
        self.keys_asked.add(key)
        return super().__getitem__(key)


def not_in_config(
    metadata: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    factors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> list[str]:
    """Return the keys of the architecture that no config is made of: llama.cpp may read them, transformers does not.

    Args:
        metadata: as of `hf_config`.
        records: as of `hf_config`.
        factors: as of `hf_config`.
    """
    noted = _Asked(metadata)
    of = f"{hf_config(noted, records, factors) and metadata['general.architecture']}."
    told = noted.keys_asked | {f"{of}{key}" for key in _SHAPED}
    return sorted(key for key in metadata if key.startswith(of) and key not in told)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], heads: int, hidden: int, head_dim: int, kv_heads: int) -> int:
    """Compare the embedding's and the first query's shape with the metadata; return the size of the vocabulary."""
    fused = "blk.0.attn_qkv.weight" in shapes
    name = "blk.0.attn_qkv.weight" if fused else "blk.0.attn_q.weight"
    rows = (heads + 2 * kv_heads if fused else heads) * head_dim
    embedding, query = shapes.get("token_embd.weight"), shapes.get(name)
    if embedding is None or len(embedding) != 2 or embedding[1] != hidden:
        raise TensorkeepError(f"token_embd.weight is {embedding} and embedding_length {hidden}", code="C03")
    if query is None or query != (rows, hidden):
        raise TensorkeepError(
            f"{name} is {query}, and {heads} heads of {head_dim} over {hidden} are announced", code="C03"
        )
    return embedding[0]


def _rope(fields: Fields, model: str, head_dim: int, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Make the config's RoPE entries, scaling included."""
    frequencies = factors.get(FACTORS, ())
    theta = shortest(fields.number("rope.freq_base", 10000.0, 1.0))
    rotary = fields.whole("rope.dimension_count", head_dim)
    if model == "phi3":
        return _phi3_rope(fields, theta, rotary, head_dim, factors)
    if rotary != head_dim:
        raise TensorkeepError(
            f"RoPE turns {rotary} of {head_dim} dimensions, which these model types cannot say", code="C03"
        )
    if stray := [n for n in (LONG, SHORT) if n in factors]:
        raise TensorkeepError(f"{stray[0]} holds factors of RoPE that these model types cannot say", code="C03")
    scaling: dict[str, Any] | None = None
    kind = fields.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": shortest(fields.number("rope.scaling.factor", 1.0))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = fields.whole("rope.scaling.original_context_length")
    elif kind not in (None, "none"):
        raise TensorkeepError(f"the RoPE scaling {_short(kind)} has no counterpart here", code="C03")
    if any(f != 1.0 for f in frequencies):
        scaling = {"rope_type": "llama3", "factor": shortest(max(frequencies)), **LLAMA3}
        sound = len(frequencies) * 2 == head_dim and all(1.0 <= f < 1e6 for f in frequencies)
        if not sound or not _same(frequencies, llama3_factors(theta, head_dim, scaling)):
            raise TensorkeepError(
                "rope_freqs.weight holds factors that are not those of Llama 3's RoPE scaling", code="C03"
            )
    parameters: dict[str, Any] = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    if model == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": shortest(local_theta(fields))}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _phi3_rope(
    fields: Fields, theta: float, rotary: int, head_dim: int, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Make phi3's RoPE entries: how much of a head it turns, and the factors for short and for long texts."""
    if rotary > head_dim or rotary % 2:
        raise TensorkeepError(f"RoPE turns {rotary} of {head_dim} dimensions", code="C03")
    part = rotary / head_dim
    longest = fields.whole("context_length")
    original = fields.whole("rope.scaling.original_context_length", longest)
    scaling: dict[str, Any] | None = None
    if LONG in factors or SHORT in factors:
        found = [[shortest(v) for v in factors.get(name, ())] for name in (SHORT, LONG)]
        if any(len(f) * 2 != rotary for f in found):
            raise TensorkeepError(f"{SHORT} and {LONG} must have {rotary // 2} values each", code="C03")
        scaling = {"rope_type": "longrope", "short_factor": found[0], "long_factor": found[1]}
        usual = attention_factor(longest, original)
        said = fields.number("rope.scaling.attn_factor", usual)
        if not math.isclose(said, usual, rel_tol=1e-6):
            scaling["attention_factor"] = shortest(said)
    window = fields.whole("attention.sliding_window", 0, 0) or None
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta, "partial_rotary_factor": part}
    return {
        "rope_theta": theta,
        "rope_scaling": {**scaling, "type": "longrope"} if scaling else None,
        "rope_parameters": parameters,
        "partial_rotary_factor": part,
        "original_max_position_embeddings": original,
        "sliding_window": window,
    }


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> list[float]:
    """Return what Llama 3's scaling divides each of the head_dim / 2 frequencies by (as modeling_rope_utils does)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, out = scaling["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        out.append(1 / ((1 - min(max(smooth, 0.0), 1.0)) / factor + min(max(smooth, 0.0), 1.0)))
    return out


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b))


def _width(fields: Fields, kind: str, experts: int) -> dict[str, Any]:
    """Make the config's entries for the width of the MLP, and for experts."""
    if kind not in ("qwen3_moe", "mixtral"):
        return {"intermediate_size": fields.whole("feed_forward_length")}
    used = fields.whole("expert_used_count")
    if kind == "mixtral":
        return {
            "intermediate_size": fields.whole("feed_forward_length"),
            "num_local_experts": experts,
            "num_experts_per_tok": used,
        }
    narrow = fields.whole("expert_feed_forward_length")
    return {
        "intermediate_size": fields.whole("feed_forward_length", narrow),
        "moe_intermediate_size": narrow,
        "num_experts": experts,
        "num_experts_per_tok": used,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def special_token_ids(metadata: Mapping[str, Any], vocabulary: int) -> dict[str, int | None]:
    """Return the ids of bos, eos and pad; None where the file gives none or one beyond the vocabulary."""
    out: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        out[f"{name}_token_id"] = value if type(value) is int and 0 <= value < vocabulary else None
    return out


def _dtype(records: Mapping[str, TensorRecord]) -> str:
    """Name the torch dtype to load in: that of most matrices; bfloat16 where they are quantized."""
    matrices = [r for r in records.values() if len(r.shape) > 1 and DTYPES[r.dtype].floating]
    if any(r.encoding != "plain" for r in matrices) or not matrices:
        return "bfloat16"
    kinds = [r.dtype for r in matrices]
    return str(DTYPES[max(sorted(set(kinds)), key=kinds.count)].torch)


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: what a person wrote before it was stored as one.

    >>> shortest(9.999999747378752e-06), shortest(500000.0)
    (1e-05, 500000.0)
    """
    try:
        stored = struct.pack("<f", value)
        return next(
            (v for d in range(1, 10) if struct.pack("<f", v := float(f"{value:.{d}g}")) == stored), float(value)
        )
    except OverflowError:  # beyond float32: it never was one
        return float(value)


def companions(config: Mapping[str, Any]) -> list[Companion]:
    """Make config.json and generation_config.json."""
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    documents = {"config.json": dict(config), "generation_config.json": {"_from_model_config": True, **ids}}
    return [
        Companion(n, (json.dumps(d, indent=2) + "\n").encode(), "made from the GGUF metadata")
        for n, d in documents.items()
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
