"""Compare the config fields that change what a model computes, in one spelling for transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorkeep.conversion import architecture
from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.naming.rope import partial_rotary

# fields compared as they stand: a difference changes shapes or results
PLAIN = (
    "model_type hidden_size num_hidden_layers intermediate_size num_attention_heads vocab_size "
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon attention_bias mlp_bias qkv_bias "
    "sliding_window use_sliding_window max_window_layers layer_types "
    "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
    "attention_multiplier residual_multiplier embedding_multiplier logits_scaling "
    "num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size decoder_sparse_step "
    "routed_scaling_factor image_size patch_size num_channels num_labels "
    "embedding_size n_embd n_layer n_head d_model num_layers num_heads"
).split()
# what the config class fills in where the file says nothing
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "use_cache": True,
}
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
THETA = 10000.0  # the default of every RoPE model in transformers
_SCALING = (
    "factor low_freq_factor high_freq_factor original_max_position_embeddings beta_fast beta_slow "
    "attention_factor mscale mscale_all_dim short_factor long_factor"
).split()


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config means, by one name a field; absent fields are left out unless their default is known.

    >>> fields({"rope_theta": 5e5})["rope_theta"] == fields({"rope_parameters": {"rope_theta": 5e5}})["rope_theta"]
    True
    """
    out: dict[str, Any] = {k: config[k] for k in PLAIN if config.get(k) is not None}
    out |= {k: v for k, v in _DEFAULTS.items() if k not in out}
    if architecture.head_dim(config):
        out["head_dim"], out["num_key_value_heads"] = architecture.head_dim(config), architecture.kv_heads(config)
    spellings = ("hidden_act", "hidden_activation", "activation_function", "hidden_activation_function")
    act = next((config[k] for k in spellings if isinstance(config.get(k), str)), None)
    if act is not None:
        out["hidden_act"] = _ACTIVATIONS.get(act, act)
    tied = hf.tied(dict(config))
    if tied is not None and ("vocab_size" in config or "tie_word_embeddings" in config):
        out["tie_word_embeddings"] = tied
    return out | rope(config)


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's theta, kind and factors: from the top and rope_scaling (transformers 4) or rope_parameters (5)."""
    nested = config.get("rope_parameters")
    new: Mapping[str, Any] = nested if isinstance(nested, Mapping) else {}
    if new and all(isinstance(v, Mapping) for v in new.values()):  # one a kind of layer (gemma3)
        return {"rope_parameters": {k: dict(v) for k, v in sorted(new.items())}}
    scaling = config.get("rope_scaling")
    old: Mapping[str, Any] = scaling if isinstance(scaling, Mapping) else {}
    both = {**old, **new}
    theta = new.get("rope_theta", config.get("rope_theta"))
    kind = both.get("rope_type", both.get("type", "default"))
    out: dict[str, Any] = {"rope_type": kind, "partial_rotary_factor": partial_rotary(config)}
    if theta is not None or "hidden_act" in config or new or old:
        out["rope_theta"] = float(theta) if isinstance(theta, (int, float)) else THETA
    if kind != "default":
        out |= {f"rope_{k}": both[k] for k in _SCALING if both.get(k) is not None}
    return out


def said_twice(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find what a config says of RoPE in transformers 4's place and otherwise in transformers 5's.

    Args:
        config: The contents of a config.json; the configs inside it (`text_config`) are looked at as well.

    Returns:
        (transformers 4's value, transformers 5's) by field; a field that stands in one place only is no contradiction.

    Example:
        >>> said_twice({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
        {'rope_theta': (10000.0, 500000.0)}
    """
    out: dict[str, tuple[Any, Any]] = {}
    nested, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    new: Mapping[str, Any] = nested if isinstance(nested, Mapping) else {}
    if not any(isinstance(v, Mapping) for v in new.values()):  # one a kind of layer (gemma3) has no older spelling
        old = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config}
        old |= scaling if isinstance(scaling, Mapping) else {}
        kinds = [s.get("rope_type", s.get("type")) for s in (old, new)]
        if None not in kinds and kinds[0] != kinds[1]:
            out["rope_type"] = kinds[0], kinds[1]
        same = ("rope_theta", "partial_rotary_factor", *_SCALING)
        out |= {k: (old[k], new[k]) for k in same if k in old and k in new and not _same(old[k], new[k])}
    inner = {k: said_twice(v) for k, v in config.items() if k.endswith("_config") and isinstance(v, Mapping)}
    return out | {f"{k}.{field}": sides for k, found in inner.items() for field, sides in found.items()}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the fields in which two configs differ; a field on one side only counts as no difference.

    Args:
        mine: The checkpoint's config.
        theirs: The reference's config.

    Returns:
        (checkpoint's value, reference's value) by field.

    Example:
        >>> differences({"model_type": "llama", "rms_norm_eps": 1e-5}, {"model_type": "llama", "rms_norm_eps": 1e-6})
        {'rms_norm_eps': (1e-05, 1e-06)}
    """
    a, b = fields(mine), fields(theirs)
    return {k: (a[k], b[k]) for k in a if k in b and not _same(a[k], b[k])} | {
        k: (a.get(k), b.get(k))
        for k in (set(a) ^ set(b))
        if k.startswith("rope_") and k not in ("rope_theta", "rope_parameters")
    }


def _same(a: Any, b: Any) -> bool:
    """Say whether two values are equal, numbers up to rounding to float32."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)):
        return bool(abs(a - b) <= 1e-6 * max(abs(a), abs(b)))  # llama.cpp stores eps as fp32: 9.99999975e-06
    return bool(a == b)


def against_shapes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Any, Any]]:
    """Find the fields that the shapes of the weights contradict.

    Args:
        config: The checkpoint's config.
        shapes: Shapes of its tensors by Hugging Face name.

    Returns:
        (the config's value, what the weights say) by field.
    """
    out: dict[str, tuple[Any, Any]] = {}
    embed = shapes.get(hf.EMBEDDING)
    if embed is not None and len(embed) == 2:
        for field, size in (("vocab_size", embed[0]), ("hidden_size", embed[1])):
            if isinstance(config.get(field), int) and config[field] != size:
                out[field] = config[field], size
    numbers = [int(p[1]) for n in shapes if n.startswith("model.layers.") and (p := n.split(".")[1:3])[1].isdigit()]
    if numbers and isinstance(config.get("num_hidden_layers"), int) and config["num_hidden_layers"] != max(numbers) + 1:
        out["num_hidden_layers"] = config["num_hidden_layers"], max(numbers) + 1
    q, k, norm = (shapes.get(f"model.layers.0.self_attn.{p}.weight") for p in ("q_proj", "k_proj", "q_norm"))
    heads, dim, kv = config.get("num_attention_heads"), architecture.head_dim(config), architecture.kv_heads(config)
    family = architecture.FAMILIES.get(str(config.get("model_type")))
    # without a table heads may be gated or of two parts: there transformers' own shapes are compared
    if family is not None and isinstance(heads, int) and dim:
        if q is not None and q[0] != heads * dim:
            out["num_attention_heads"] = heads, f"{q[0]} rows of q"
        if k is not None and k[0] != kv * dim:
            out["num_key_value_heads"] = kv, f"{k[0]} rows of k"
        if norm is not None and family.qk == "head" and norm != (dim,):
            out["head_dim"] = dim, norm[0]
    return out
