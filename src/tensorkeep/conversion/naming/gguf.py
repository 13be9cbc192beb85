"""Naming `gguf`: llama.cpp's names (`blk.0.attn_q.weight`), one table for each model type.

llama.cpp turns RoPE's pairs as neighbours for the llama family, so its converter permutes the rows of q and k (and
their biases) as Meta's layout has them; for the others it turns halves, and rows stay. It multiplies by gemma's
gains as they are stored, so its converter adds 1 to them. The values of such a file's config and tokenizer are in its
metadata: `hf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tensorkeep.conversion.naming.table import Row, matcher
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.gguf_config import hf_config

__all__ = ["COMPUTED", "FAMILIES", "NAME", "hf_config", "recognise", "table"]

NAME = "gguf"
COMPLETE = True
READ_ONLY = "these names go with the format: --to gguf"
# factors of RoPE's frequencies: read into the config when the file is opened
COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LAYER = "model.layers.{n}."


def _experts(own: str, hf: Mapping[str, str]) -> list[Row]:
    """Return the rows of the stacked experts' three projections."""
    return [
        Row(f"blk.{{n}}.ffn_{w}_exps.weight", f"{LAYER}{own}.experts.{{e}}.{proj}", stacked=True)
        for w, proj in hf.items()
    ]


def _rows(
    rope: bool, norms: Mapping[str, str], more: Sequence[Row] = (), plus: int = 0, head: bool = True
) -> list[Row]:
    """Return the table of one model type: whether q/k rows are permuted, which norms a layer has and what they add."""
    return [
        Row("token_embd", "model.embed_tokens"),
        Row("blk.{n}.attn_q", f"{LAYER}self_attn.q_proj", rope),
        Row("blk.{n}.attn_k", f"{LAYER}self_attn.k_proj", rope),
        Row("blk.{n}.attn_v", f"{LAYER}self_attn.v_proj"),
        Row("blk.{n}.attn_output", f"{LAYER}self_attn.o_proj"),
        *(Row(f"blk.{{n}}.{own}", f"{LAYER}{hf}", plus=plus) for own, hf in norms.items()),
        *more,
        Row("blk.{n}.ffn_gate", f"{LAYER}mlp.gate_proj"),
        Row("blk.{n}.ffn_up", f"{LAYER}mlp.up_proj"),
        Row("blk.{n}.ffn_down", f"{LAYER}mlp.down_proj"),
        Row("output_norm", "model.norm", plus=plus),
        *([Row("output", "lm_head")] if head else []),
    ]


_PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_BOTH = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
_BOTH |= {"ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_QWEN_EXPERTS = _experts("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
_MIXTRAL_EXPERTS = _experts("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})
FAMILIES = {
    "llama": _rows(True, _PRE),
    "mistral": _rows(True, _PRE),
    "mixtral": _rows(True, _PRE, [Row("blk.{n}.ffn_gate_inp", f"{LAYER}block_sparse_moe.gate"), *_MIXTRAL_EXPERTS]),
    "qwen2": _rows(False, _PRE),
    "qwen3": _rows(False, {**_PRE, **_QK}),
    "qwen3_moe": _rows(False, {**_PRE, **_QK}, [Row("blk.{n}.ffn_gate_inp", f"{LAYER}mlp.gate"), *_QWEN_EXPERTS]),
    "olmo2": _rows(False, {**_POST, **_QK}),
    "gemma": _rows(False, _PRE, plus=1, head=False),
    "gemma2": _rows(False, _BOTH, plus=1, head=False),
    "gemma3_text": _rows(False, {**_BOTH, **_QK}, plus=1),
    "phi3": [
        Row("token_embd", "model.embed_tokens"),
        Row("blk.{n}.attn_qkv", f"{LAYER}self_attn.qkv_proj"),
        Row("blk.{n}.attn_output", f"{LAYER}self_attn.o_proj"),
        *(Row(f"blk.{{n}}.{own}", f"{LAYER}{hf}") for own, hf in _PRE.items()),
        Row("blk.{n}.ffn_up", f"{LAYER}mlp.gate_up_proj"),
        Row("blk.{n}.ffn_down", f"{LAYER}mlp.down_proj"),
        Row("output_norm", "model.norm"),
        Row("output", "lm_head"),
    ],
}
_ALL = [row for rows in FAMILIES.values() for row in rows]
_fits = matcher(_ALL)


@lru_cache(1 << 14)
def recognise(name: str) -> bool:
    """Whether this is a name of llama.cpp's, of any architecture.

    >>> recognise("blk.0.attn_q.weight"), recognise("model.layers.0.self_attn.q_proj.weight")
    (True, False)
    """
    return name.startswith("blk.") or name in COMPUTED or _fits(name)


def table(_names: object, config: Mapping[str, Any] | None) -> list[Row]:
    """Return the table for a config's model type.

    Raises:
        TensorkeepError: C03 where there is no table for it: whether rows are permuted is then unknown.
    """
    kind = (config or {}).get("model_type")
    if kind not in FAMILIES:
        what = (
            "no config says which model this is" if kind is None else f"no table for the model type {str(kind)[:40]!r}"
        )
        raise TensorkeepError(
            f"GGUF names, and {what}: whether q/k rows are permuted is unknown",
            code="C03",
            hint=f"known are {', '.join(FAMILIES)}; others go through transformers: "
            "from_pretrained(DIR, gguf_file=FILE)",
        )
    return FAMILIES[kind]
