"""`dummy`: names of a program that calls a layer a floor, and turns RoPE's pairs as neighbours."""

from __future__ import annotations

from tensorkeep.conversion.naming.table import Row, matcher

NAME = "dummy"
LOADERS = ("dummyloader",)
FAMILIES = {
    "llama": [
        Row("words", "model.embed_tokens"),
        Row("floor.{n}.query", "model.layers.{n}.self_attn.q_proj", True),
        Row("floor.{n}.key", "model.layers.{n}.self_attn.k_proj", True),
        Row("floor.{n}.value", "model.layers.{n}.self_attn.v_proj"),
        Row("floor.{n}.back", "model.layers.{n}.self_attn.o_proj"),
        Row("floor.{n}.gate", "model.layers.{n}.mlp.gate_proj"),
        Row("floor.{n}.up", "model.layers.{n}.mlp.up_proj"),
        Row("floor.{n}.down", "model.layers.{n}.mlp.down_proj"),
        Row("floor.{n}.before", "model.layers.{n}.input_layernorm"),
        Row("floor.{n}.after", "model.layers.{n}.post_attention_layernorm"),
        Row("roof", "model.norm"),
        Row("answers", "lm_head"),
    ]
}


_fits = matcher(FAMILIES["llama"])


def recognise(name: str) -> bool:
    """Return whether a name is one of the table."""
    return _fits(name)
