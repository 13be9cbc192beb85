"""Say a model's config and tokenizer as GGUF metadata, and check that reading it gives the same model.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the values that llama.cpp's own converter writes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import Companion
from tensorkeep.formats.gguf_config import FACTORS, LLAMA3, hf_config, llama3_factors, shortest
from tensorkeep.formats.gguf_families import (
    GEMMAS,
    LOCAL_THETA,
    attention_factor,
    gemma_entries,
    long_factors,
    refuse_gemma,
    unsaid,
)
from tensorkeep.formats.gguf_vocabulary import vocabulary_of
from tensorkeep.storage.layout import SinkTensor
from tensorkeep.storage.record import TensorRecord

# transformers' model type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "olmo2": "olmo2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# llama.cpp's LLAMA_FTYPE_*, which a file names for people: what most matrices are
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
_FILE_TYPES |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38}
# what the metadata of these architectures cannot say: key -> the value that a reader assumes
_ASSUMED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 1.0,
    "clip_qkv": None,
}
# what a config read back need not repeat: who loads it, how it is initialised or trained, how RoPE is spelled
_NOT_COMPARED = {
    "architectures",
    "model_type",
    "dtype",
    "initializer_range",
    "use_cache",
    "attention_dropout",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
}


_LONGROPE = {"short_factor", "long_factor", "partial_rotary_factor", "attention_factor"}


def metadata_of(
    config: Mapping[str, Any] | None, companions: Sequence[Companion], tensors: Sequence[SinkTensor]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Say config and tokenizer as the metadata of a GGUF file.

    Args:
        config: as config.json has it.
        companions: the files beside the weights; of these tokenizer.json, its configs and the chat template are used.
        tensors: the tensors to be written, under llama.cpp's names.

    Returns:
        The entries by key, and the tensors that divide RoPE's frequencies, by name (none where all factors are 1).

    Raises:
        TensorkeepError: C03 where the metadata cannot say what config or tokenizer say, so that llama.cpp would compute
            another model.

    Example:
        >>> metadata_of(config, companions, tensors)[0]["llama.block_count"]  # doctest: +SKIP
        30
    """
    if config is None:
        raise TensorkeepError("no config.json says which model this is", code="C03", hint="give one: --config FOLDER")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise TensorkeepError(
            f"no GGUF metadata is known here for the model type {str(kind)[:40]!r}",
            code="C03",
            hint=f"known are {', '.join(ARCHITECTURES)}; others: llama.cpp's convert_hf_to_gguf.py",
        )
    refuse_unsaid(config)
    entries, factors = _model(config, ARCHITECTURES[str(kind)])
    records = {t.name: TensorRecord(t.name, t.dtype, t.shape, (), encoding=t.encoding) for t in tensors}
    _compare(config, hf_config(entries, records, factors))
    matrices = [t.dtype if t.encoding == "plain" else t.encoding for t in tensors if len(t.shape) > 1]
    most = max(sorted(set(matrices)), key=matrices.count) if matrices else "F32"
    if most in _FILE_TYPES:
        entries["general.file_type"] = _FILE_TYPES[most]
    if any(t.encoding != "plain" for t in tensors):
        entries["general.quantization_version"] = 2
    return entries | vocabulary_of(_documents(companions), _whole(config, "vocab_size")), factors


def put_metadata(writer: Any, entries: Mapping[str, Any]) -> None:
    """Give entries to the gguf package's writer: whole numbers as uint32, others as float32.

    Args:
        writer: a `gguf.GGUFWriter`, which has its architecture already.
        entries: from `metadata_of`.
    """
    for key, value in entries.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _documents(companions: Sequence[Companion]) -> dict[str, Any]:
    """Return the companions that describe a tokenizer, by file name: JSON as data, text as text."""
    out: dict[str, Any] = {}
    for companion in companions:
        if companion.name in ("tokenizer.json", "tokenizer_config.json"):
            try:
                out[companion.name] = json.loads(companion.data)
            except (ValueError, RecursionError):
                raise TensorkeepError("is not valid JSON", where=companion.where, code="C03") from None
        elif companion.name in ("chat_template.jinja", "tokenizer.model", "vocab.json"):
            out[companion.name] = companion.data.decode("utf-8", "replace") if "jinja" in companion.name else ""
    return out


def _model(config: Mapping[str, Any], architecture: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Say what the model computes; the factors of RoPE's frequencies are tensors and no entries."""
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head_dim = _whole(config, "head_dim", hidden // heads)
    said = {
        "vocab_size": _whole(config, "vocab_size"),
        "context_length": _whole(config, "max_position_embeddings"),
        "embedding_length": hidden,
        "block_count": _whole(config, "num_hidden_layers"),
        "feed_forward_length": _whole(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": _whole(config, "num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": _number(config, "rms_norm_eps"),
        "rope.dimension_count": head_dim,
    }
    experts = config.get("num_local_experts", config.get("num_experts"))
    if config.get("model_type") in ("mixtral", "qwen3_moe"):
        said["expert_count"] = _whole({"experts": experts}, "experts")
        said["expert_used_count"] = _whole(config, "num_experts_per_tok")
    if config.get("model_type") == "qwen3_moe":
        said["expert_feed_forward_length"] = _whole(config, "moe_intermediate_size")
    if config.get("model_type") in GEMMAS:
        refuse_gemma(config, said)
        said |= gemma_entries(config)
    scaling, factors = _scaling(config, said)
    entries = {"general.architecture": architecture, "general.type": "model"}
    return {**entries, **{f"{architecture}.{key}": value for key, value in (said | scaling).items()}}, factors


def _scaling(config: Mapping[str, Any], said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Say a config's RoPE: entries, and the tensors of factors."""
    rope, head_dim = _rope(config), said["attention.key_length"]
    theta = float(rope["rope_theta"])
    out: dict[str, Any] = {"rope.freq_base": theta}
    if config.get("model_type") == "phi3":
        rotary = int(head_dim * float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
        longest = said["context_length"]
        given = (
            rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
        )
        original = _whole({"original_max_position_embeddings": given}, "original_max_position_embeddings")
        window = config.get("sliding_window")
        out |= {"rope.dimension_count": rotary, "rope.scaling.original_context_length": original}
        out["attention.sliding_window"] = window if type(window) is int and window > 0 else 0
        if rope["rope_type"] != "longrope":
            return out, {}
        out["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or attention_factor(longest, original))
        return out, long_factors(rope, rotary // 2)
    if rope["rope_type"] == "llama3":
        return out, {FACTORS: llama3_factors(theta, head_dim, rope)}
    if rope["rope_type"] in ("linear", "yarn"):
        out["rope.scaling.type"] = rope["rope_type"]
        out["rope.scaling.factor"] = float(rope["factor"])
        if rope["rope_type"] == "yarn":
            out["rope.scaling.original_context_length"] = _whole(rope, "original_max_position_embeddings")
    return out, {}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's RoPE as transformers 5 spells it, from either version's spelling."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(found, Mapping) and config.get("model_type") == "gemma3_text" and "full_attention" in found:
        local = found.get("sliding_attention") or {}
        if local.get("rope_theta", LOCAL_THETA) != LOCAL_THETA or local.get("rope_type", "default") != "default":
            raise unsaid(f"sliding_attention with RoPE {json.dumps(local)[:80]}")
        found = found["full_attention"]
    if not isinstance(found, Mapping):
        raise TensorkeepError("config.json: its RoPE parameters are no mapping", code="C03")
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **found}
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    known = {"rope_type", "rope_theta", "type", "factor", "original_max_position_embeddings", *LLAMA3}
    types: tuple[str, ...] = ("default", "llama3", "linear", "yarn")
    if config.get("model_type") == "phi3":
        types, known = ("default", "longrope"), known | _LONGROPE
        rope["rope_type"] = "longrope" if rope["rope_type"] in ("su", "yarn") else rope["rope_type"]
    elif config.get("model_type") in GEMMAS:
        types = ("default", "linear") if config.get("model_type") == "gemma3_text" else ("default",)
    odd = sorted(set(rope) - known)
    if rope["rope_type"] not in types or odd:
        what = f"RoPE of the type {str(rope['rope_type'])[:40]!r}" + (f" with {', '.join(odd)[:80]}" if odd else "")
        raise unsaid(what)
    if rope["rope_type"] in ("llama3", "linear", "yarn"):
        _number(rope, "factor")
    others = {k: rope.get(k) for k in LLAMA3 if rope["rope_type"] == "llama3" and rope.get(k) != LLAMA3[k]}
    if others:
        raise unsaid(f"Llama 3's RoPE scaling with {json.dumps(others)[:120]}")
    for key in known & set(rope) - {"rope_type", "type", "short_factor", "long_factor"}:
        _number(rope, key)
    return rope


def refuse_unsaid(config: Mapping[str, Any]) -> None:
    """Stop where the config asks for what the metadata cannot say.

    Args:
        config: as config.json has it.

    Raises:
        TensorkeepError: C03 naming it.
    """
    kind = config.get("model_type")
    own = _ASSUMED if kind not in GEMMAS else {}  # `refuse_gemma` has theirs
    for key, assumed in own.items():
        if kind == "phi3" and key == "partial_rotary_factor":
            continue
        if config.get(key, assumed) not in (assumed, None) and not (key == "mlp_only_layers" and not config[key]):
            raise unsaid(f"{key} {json.dumps(config[key])[:60]}")
    layers = config.get("layer_types")
    window = config.get("sliding_window") if config.get("model_type") in ("mistral", "mixtral") else None
    if kind not in GEMMAS and isinstance(layers, list) and any(what != "full_attention" for what in layers):
        raise unsaid("layers with sliding attention")
    longest = config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window < longest:
        raise unsaid(f"a sliding window of {window} in a context of {longest}")


def contradictions(config: Mapping[str, Any], back: Mapping[str, Any]) -> list[str]:
    """Return what a config says otherwise than the one that is made of a file's metadata.

    Args:
        config: as config.json has it.
        back: from `hf_config`.

    Raises:
        TensorkeepError: C03 where the metadata cannot say the config's RoPE at all.
    """
    wrong = [
        f"{key} {json.dumps(config[key])[:40]} comes back as {json.dumps(value)[:40]}"
        for key, value in back.items()
        if key in config and key not in _NOT_COMPARED | {"rope_parameters"} and config[key] not in (value, None)
    ]
    mine, theirs = _rope(config), _rope(back)
    aside = {"type", "partial_rotary_factor", "original_max_position_embeddings", "factor"}
    aside = {"type"} if config.get("model_type") != "phi3" else aside  # said by entries that are compared above
    return wrong + [
        f"{key} {mine.get(key)} comes back as {theirs.get(key)}"
        for key in sorted({*mine, *theirs} - aside)
        if _short(mine.get(key)) != _short(theirs.get(key))
        and (mine["rope_type"] != "llama3" or key not in LLAMA3 or mine.get(key) != LLAMA3[key])
    ]


_SCALARS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}


def other_numbers(config: Mapping[str, Any], entries: Mapping[str, Any]) -> list[str]:
    """Return the numbers that a file's metadata says, llama.cpp computes with, and a config says otherwise.

    Args:
        config: as config.json has it.
        entries: the metadata; what it leaves out is no contradiction.
    """
    found = dict(config)
    with contextlib.suppress(TensorkeepError):
        found |= {"rope_theta": _rope(config)["rope_theta"]}
    told = []
    for key, entry in _SCALARS.items():
        mine: Any = found.get(key)
        theirs: Any = entries.get(f"{entries.get('general.architecture')}.{entry}")
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (mine, theirs))
        if numbers and abs(float(mine) - float(theirs)) > 1e-6 * abs(float(theirs)):
            told.append(f"{key} {mine} for {shortest(float(theirs))}")
    return told


def _compare(config: Mapping[str, Any], back: Mapping[str, Any]) -> None:
    """Stop where the config that our reader makes of the metadata is another model's."""
    if wrong := contradictions(config, back):
        raise unsaid("; ".join(wrong[:3]))


def _short(value: Any) -> Any:
    """Return a list of numbers as float32 holds them; any other value as it is."""
    return [shortest(float(v)) for v in value] if isinstance(value, list) else value


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive whole number of the config, which must be there where nothing stands for it."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise TensorkeepError(f"config.json gives {str(value)[:40]} for {key}", code="C03")
    return value


def _number(config: Mapping[str, Any], key: str) -> float:
    """Return a number of the config that float32 can hold."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise TensorkeepError(f"config.json gives {str(value)[:40]} for {key}", code="C03")
    if shortest(float(value)) != float(value):
        raise TensorkeepError(f"config.json gives {value} for {key}, which float32 cannot hold", code="C03")
    return float(value)
