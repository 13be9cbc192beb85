"""Rows of Meta's names for a llama, which torchtitan and MiniMind's first generation took over."""

from __future__ import annotations

from collections.abc import Sequence

from tensorkeep.conversion.naming.table import Row


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
