"""Naming `torchtitan`: the names of torchtitan 0.3 (`layers.0.attention.qkv_linear.wq.weight`, `lm_head.weight`).

Two families, after torchtitan's own state dict adapters: llama3 (complex RoPE on interleaved pairs, so q/k rows are
permuted) and qwen3 (cos/sin RoPE on halves, no permutation; experts stacked). torchtitan has no model for other
architectures, and its loader never asks for tensors its model lacks: conversions say both by name (K07).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tensorkeep.conversion.naming.table import Row, fits
from tensorkeep.errors import TensorkeepError

NAME = "torchtitan"
LOADERS = ("torchtitan",)
VERSION = "0.3"
EXPERT_BIAS = "moe.expert_bias_E"  # of each sparse layer, in the weights' own state dict
MODEL_TYPES = {"llama": "llama3", "qwen3": "qwen3", "qwen3_moe": "qwen3"}


def rows(attention: str, head: str, experts: Sequence[Row], rope: bool) -> list[Row]:
    """Return the table of one family; versions differ in where q/k/v live, in the head's name and in the experts'."""
    return [
        Row("tok_embeddings", "model.embed_tokens"),
        Row(f"layers.{{n}}.attention.{attention}wq", "model.layers.{n}.self_attn.q_proj", rope),
        Row(f"layers.{{n}}.attention.{attention}wk", "model.layers.{n}.self_attn.k_proj", rope),
        Row(f"layers.{{n}}.attention.{attention}wv", "model.layers.{n}.self_attn.v_proj"),
        Row("layers.{n}.attention.wo", "model.layers.{n}.self_attn.o_proj"),
        Row("layers.{n}.attention.q_norm", "model.layers.{n}.self_attn.q_norm", rope),
        Row("layers.{n}.attention.k_norm", "model.layers.{n}.self_attn.k_norm", rope),
        *experts,
        Row("layers.{n}.moe.router.gate", "model.layers.{n}.mlp.gate"),
        Row("layers.{n}.feed_forward.w1", "model.layers.{n}.mlp.gate_proj"),
        Row("layers.{n}.feed_forward.w3", "model.layers.{n}.mlp.up_proj"),
        Row("layers.{n}.feed_forward.w2", "model.layers.{n}.mlp.down_proj"),
        Row("layers.{n}.attention_norm", "model.layers.{n}.input_layernorm"),
        Row("layers.{n}.ffn_norm", "model.layers.{n}.post_attention_layernorm"),
        Row("norm", "model.norm"),
        Row(head, "lm_head"),
    ]


def experts(prefix: str, w1: str, w2: str, w3: str) -> list[Row]:
    """Return the rows of the stacked experts' three projections."""
    return [
        Row(f"layers.{{n}}.moe.{prefix}.{w1}", "model.layers.{n}.mlp.experts.{e}.gate_proj", stacked=True),
        Row(f"layers.{{n}}.moe.{prefix}.{w3}", "model.layers.{n}.mlp.experts.{e}.up_proj", stacked=True),
        Row(f"layers.{{n}}.moe.{prefix}.{w2}", "model.layers.{n}.mlp.experts.{e}.down_proj", stacked=True),
    ]


EXPERTS = experts("routed_experts.inner_experts", "w1_EFD", "w2_EDF", "w3_EFD")
FAMILIES = {
    "llama3": rows("qkv_linear.", "lm_head", [], rope=True),
    "qwen3": rows("qkv_linear.", "lm_head", EXPERTS, rope=False),
}
# buffers that eras before 2025-08 stored; torchtitan computes them anew
COMPUTED = ("freqs_cis", "rope_cache", "rope.cache")


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of torchtitan's own."""
    # `norm` and `lm_head` are everybody's; they count once something of our own stands beside them
    return name in COMPUTED or (fits(name, FAMILIES["qwen3"]) and not name.startswith("lm_head."))


def family(names: Iterable[str], config: dict[str, Any] | None) -> str:
    """Tell which family's table holds, from the config and from norms on q and k (own or hf names).

    Raises:
        TensorkeepError: torchtitan has no model for this architecture, or its llama3 has no place for the norms (K07).
    """
    kind = (config or {}).get("model_type")
    names = list(names)
    if isinstance(kind, str) and kind not in MODEL_TYPES and kind != "minimind":
        raise TensorkeepError(
            f"torchtitan has no model for {kind!r} (it has llama3 and qwen3)",
            hint="keep the hf names: --naming hf, which flame and torchtitan's transformers backend load",
        )
    normed = any(n.endswith(("q_norm.weight", "k_norm.weight")) for n in names)
    named = MODEL_TYPES.get(kind or "", "qwen3" if normed else "llama3")
    if named == "llama3" and normed:
        raise TensorkeepError(
            "q_norm/k_norm in a llama: torchtitan's llama3 has none and its loader would drop them",
            code="K07",
            hint="keep the hf names (--naming hf), or leave them out by name with --drop '[qk]_norm'",
        )
    return named


def dropped_by_loader(own: str, named: str) -> bool:
    """Whether torchtitan's loader would leave a tensor of the table out without a word, as it does with every bias.

    Args:
        own: torchtitan's name of the tensor.
        named: the family, "llama3" or "qwen3".

    Returns:
        True where the model has no place for it (K07).
    """
    return own.endswith(".bias")
