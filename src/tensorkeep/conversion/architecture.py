"""List the tensors that a config asks for, by name and shape, without torch, for the decoder families in use.

What transformers would build on the meta device, written down as data. Checked against transformers itself in
tests/test_architecture.py. An unknown model type gives None, and whoever asked says that it could not be decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tensorkeep.conversion.naming import hf
from tensorkeep.storage.budget import believable

Shapes = dict[str, tuple[int, ...]]


class Family(NamedTuple):
    """How one model type differs from Llama.

    Args:
        norms: the norms of a layer.
        qk: norms of q and k: "" for none, "head" for one a head, "full" over the whole width.
        qkv_bias: whether q, k and v have a bias; None takes the config's attention_bias.
        o_bias: the same of the output projection.
        experts: how the experts' projections are named: "", "qwen" or "mixtral".
        gain: whether norms have a weight (OLMo 1 has none).
        mlp_bias: whether the class knows the config's mlp_bias at all.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qk: str = ""
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    experts: str = ""
    gain: bool = True
    mlp_bias: bool = False


POST = ("post_attention_layernorm", "post_feedforward_layernorm")
FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(qkv_bias=False, o_bias=False),
    "granite": Family(mlp_bias=True),
    "smollm3": Family(mlp_bias=True),
    "qwen2": Family(qkv_bias=True, o_bias=False),
    "qwen3": Family(qk="head"),
    "qwen3_moe": Family(qk="head", experts="qwen"),
    "mixtral": Family(qkv_bias=False, o_bias=False, experts="mixtral"),
    "olmo": Family(gain=False),
    "olmo2": Family(norms=POST, qk="full"),
    "olmo3": Family(norms=POST, qk="full"),
    "olmoe": Family(qk="full", experts="qwen"),
    "gemma": Family(),
    "gemma2": Family(norms=FOUR),
    "gemma3_text": Family(norms=FOUR, qk="head"),
}
EXPERTS = {"qwen": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
OFFSET_BY_ONE = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "qwen3_next")  # gain is 1 + weight: default 0


def expected(config: Mapping[str, Any] | None) -> Shapes | None:
    """Return the names and shapes of every tensor that the config's model has.

    A tied head is left out. Fields that the config does not give are transformers' defaults where those are common.

    Args:
        config: The contents of a config.json, or None.

    Returns:
        Shapes by Hugging Face name; None without a config, or for a model type or sizes that are not known here.

    Example:
        >>> sorted(expected({"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 0,
        ...                  "num_attention_heads": 2, "vocab_size": 10, "tie_word_embeddings": True}))
        ['model.embed_tokens.weight', 'model.norm.weight']
    """
    family = FAMILIES.get(str((config or {}).get("model_type")))
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    if family is None or config is None or not all(isinstance(config.get(k), int) and config[k] >= 0 for k in wanted):
        return None
    if config["num_attention_heads"] < 1 or not believable(config):
        return None
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    out: Shapes = {hf.EMBEDDING: (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        out.update({f"model.layers.{layer}.{n}": shape for n, shape in _layer(config, family, layer)})
    if family.gain:
        out["model.norm.weight"] = (hidden,)
    if not hf.tied(dict(config)):
        out[hf.HEAD] = (vocab, hidden)
    return out


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of a head: as the config gives it, or hidden size over heads; 0 where it gives neither.

    Args:
        config: a model's config.
    """
    given, heads, hidden = (config.get(k) for k in ("head_dim", "num_attention_heads", "hidden_size"))
    if isinstance(given, int) and given > 0:
        return given
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else 0


def kv_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key and value heads: as many as query heads where the config does not say.

    Args:
        config: a model's config.
    """
    given = config.get("num_key_value_heads")
    return int(given if isinstance(given, int) and given > 0 else config.get("num_attention_heads") or 0)


def _layer(config: Mapping[str, Any], family: Family, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of one layer."""
    hidden, dim = config["hidden_size"], head_dim(config)
    q, kv = config["num_attention_heads"] * dim, kv_heads(config) * dim
    bias = bool(config.get("attention_bias"))
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield f"self_attn.{name}.weight", (rows, hidden)
        if bias if family.qkv_bias is None else family.qkv_bias:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, q)
    if bias if family.o_bias is None else family.o_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    if family.qk:
        yield "self_attn.q_norm.weight", (dim if family.qk == "head" else q,)
        yield "self_attn.k_norm.weight", (dim if family.qk == "head" else kv,)
    if family.gain:
        yield from ((f"{norm}.weight", (hidden,)) for norm in family.norms)
    yield from _mlp(config, family, layer)


def _mlp(config: Mapping[str, Any], family: Family, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of one layer's MLP, dense or of experts."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    count = next((config[k] for k in ("num_experts", "num_local_experts") if isinstance(config.get(k), int)), 0)
    step = config.get("decoder_sparse_step") or 1
    sparse = family.experts and count and layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0
    if sparse:
        module, gate, up, down = EXPERTS[family.experts]
        own = config.get("moe_intermediate_size") if family.experts == "qwen" else None
        width = own if isinstance(own, int) else inner
        yield f"{module}.gate.weight", (count, hidden)
        for expert in range(count):
            yield f"{module}.experts.{expert}.{gate}.weight", (width, hidden)
            yield f"{module}.experts.{expert}.{up}.weight", (width, hidden)
            yield f"{module}.experts.{expert}.{down}.weight", (hidden, width)
        return
    bias = family.mlp_bias and bool(config.get("mlp_bias"))
    for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        yield f"mlp.{name}.weight", shape
        if bias:
            yield f"mlp.{name}.bias", shape[:1]
