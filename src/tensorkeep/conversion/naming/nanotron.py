"""Naming `nanotron`: nanotron's names (`model.decoder.0.pp_block.attn.qkv_proj.weight`) of its llama and qwen2.

After nanotron's own examples/llama/convert_weights.py: q, k and v are one tensor, in this order, as are gate and up.
Rows of q and k lie as in transformers, but for models trained with `rope_interleaved`, which their config says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorkeep.conversion.naming.table import Cut, Row, matcher
from tensorkeep.errors import TensorkeepError

NAME = "nanotron"
COMPLETE = True
_BLOCK = "model.decoder.{n}.pp_block."
_LAYER = "model.layers.{n}."


def _rows(rope: bool) -> list[Row]:
    """Return the table; `rope` says that the rows of q and k are interleaved."""
    return [
        Row("model.token_position_embeddings.pp_block.token_embedding", "model.embed_tokens"),
        *(
            Row(f"{_BLOCK}attn.qkv_proj", f"{_LAYER}self_attn.{w}_proj", rope and w != "v", joined=Cut("attention", i))
            for i, w in enumerate("qkv")
        ),
        Row(f"{_BLOCK}attn.o_proj", f"{_LAYER}self_attn.o_proj"),
        *(
            Row(f"{_BLOCK}mlp.gate_up_proj", f"{_LAYER}mlp.{hf}", joined=Cut("halves", i))
            for i, hf in enumerate(("gate_proj", "up_proj"))
        ),
        Row(f"{_BLOCK}mlp.down_proj", f"{_LAYER}mlp.down_proj"),
        *(Row(f"{_BLOCK}{w}", f"{_LAYER}{w}") for w in ("input_layernorm", "post_attention_layernorm")),
        Row("model.final_layer_norm.pp_block", "model.norm"),
        Row("model.lm_head.pp_block", "lm_head"),
    ]


FAMILIES = {"half": _rows(False), "interleaved": _rows(True)}
_KNOWN = ("llama", "qwen2")


_fits = matcher(FAMILIES["half"])


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of nanotron's.

    >>> recognise("model.decoder.3.pp_block.mlp.down_proj.weight"), recognise("model.decoder.layers.0.fc1.weight")
    (True, False)
    """
    return _fits(name)


def family(names: Iterable[str], config: dict[str, Any] | None) -> str:
    """Tell how the rows of q and k lie.

    Raises:
        TensorkeepError: K06 for a model type that nanotron's converter does not know.
    """
    kind = (config or {}).get("model_type")
    if kind is not None and kind not in _KNOWN:
        raise TensorkeepError(
            f"nanotron's names of {str(kind)[:40]!r} are not converted here",
            code="K06",
            hint=f"known are {' and '.join(_KNOWN)}, which its examples/llama/convert_nanotron_to_hf.py knows",
        )
    return "interleaved" if (config or {}).get("rope_interleaved") is True else "half"
