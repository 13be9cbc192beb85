"""Naming `olmo-core`: OLMo-core's names (`blocks.0.attention.w_q.weight`), as its `model_and_optim` folders hold them.

After OLMo-core's own nn/hf/convert.py. Which norm of a layer is which depends on the model type: olmo2 and olmo3 norm
what a block gives, llama and qwen3 what it gets, gemma3 both, and OLMo-core keeps gemma3's gains as 1 + weight. Rows of
q and k lie as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tensorkeep.conversion.naming.table import Row, matcher
from tensorkeep.errors import TensorkeepError

NAME = "olmo-core"
LOADERS = ("olmo-core",)
VERSION = ""
COMPLETE = True
_LAYER = "model.layers.{n}."
_BLOCK = "blocks.{n}."


def _rows(norms: Mapping[str, str], plus: int = 0) -> list[Row]:
    """Return the table of one model type: its norms by OLMo-core's names, and what these add to hf's values."""
    return [
        Row("embeddings", "model.embed_tokens"),
        *(Row(f"{_BLOCK}attention.w_{own}", f"{_LAYER}self_attn.{own}_proj") for own in "qkv"),
        Row(f"{_BLOCK}attention.w_out", f"{_LAYER}self_attn.o_proj"),
        *(Row(f"{_BLOCK}attention.{w}_norm", f"{_LAYER}self_attn.{w}_norm", plus=plus) for w in "qk"),
        *(
            Row(f"{_BLOCK}feed_forward.{own}", f"{_LAYER}mlp.{hf}")
            for own, hf in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        ),
        *(Row(f"{_BLOCK}{own}", f"{_LAYER}{hf}", plus=plus) for own, hf in norms.items()),
        Row("lm_head.norm", "model.norm", plus=plus),
        Row("lm_head.w_out", "lm_head"),
    ]


_AFTER = {"attention_norm": "post_attention_layernorm", "feed_forward_norm": "post_feedforward_layernorm"}
_BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
_BOTH = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "post_feed_forward_norm": "post_feedforward_layernorm",
}
FAMILIES = {
    "olmo2": _rows(_AFTER),
    "olmo3": _rows(_AFTER),
    "llama": _rows(_BEFORE),
    "qwen3": _rows(_BEFORE),
    "gemma3_text": _rows(_BOTH, plus=1),
}
# why OLMo-core's other models are not converted here
_REASONS = {
    "flex_olmo": "its experts are rows of one matrix and are turned",
    "olmo_hybrid": "its layers have names of two kinds",
    "qwen3_5": "OLMo-core reads it from hf alone and has no way back",
    "qwen3_5_text": "OLMo-core reads it from hf alone and has no way back",
}
_TOOL = "src/examples/huggingface/convert_checkpoint_to_hf.py of OLMo-core"


_fits = matcher(FAMILIES["gemma3_text"])


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of OLMo-core's.

    >>> recognise("blocks.0.attention.w_q.weight"), recognise("lm_head.weight")
    (True, False)
    """
    return (name.startswith("blocks.") and ".feed_forward_moe" in name) or _fits(name)


def family(names: Iterable[str], config: dict[str, Any] | None) -> str:
    """Tell which model type's table holds.

    Raises:
        TensorkeepError: C03 without a config, since the names do not tell which norm is which; K06 for a model type
            that is not converted here.
    """
    kind = (config or {}).get("model_type")
    if kind in FAMILIES:
        return str(kind)
    if kind is None:
        what = "OLMo-core's names, and no config says which model this is: which norm is which is unknown"
        hint = "give transformers' config of the model: --config DIR_OR_FILE"
        raise TensorkeepError(what, code="C03", hint=hint)
    why = _REASONS.get(str(kind), "OLMo-core's own converter has no table for it")
    raise TensorkeepError(
        f"OLMo-core's names of {str(kind)[:40]!r} are not converted here: {why}",
        code="K06",
        hint=f"known are {', '.join(FAMILIES)}; {_TOOL} converts what it knows",
    )
