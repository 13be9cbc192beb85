"""Make a transformers config for MiniMind's weights.

No weight file of MiniMind holds its config. A config of MiniMind's own beside the file comes first; what shapes show
is taken from them; the rest is the generation's default and is listed by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tensorkeep.conversion.naming import hf
from tensorkeep.conversion.naming.minimind import GENERATIONS
from tensorkeep.conversion.naming.rope import OLD_FIELDS
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.record import TensorRecord

_CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "minimind": "MiniMindForCausalLM",
}
_YARN = {
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
_FIRST = "model.layers.0.self_attn."
_Take = Callable[[str, Any], Any]


def hf_config(
    found: Mapping[str, TensorRecord], config: Mapping[str, Any] | None, made: str, tied: bool = True
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the config for weights of generation `made` (hf names in `found`), what it assumes, and what it overrules.

    `tied` is what head and embedding show. The second value lists the assumed fields as `name=value`; the third what
    the given config says otherwise than the weights, which win.

    Raises:
        TensorkeepError: the shapes are no MiniMind model's, or the config cannot be meant for them.
    """
    given = dict(config or {})
    given = {**{new: given[old] for old, new in OLD_FIELDS.items() if old in given}, **given}
    assumed: list[str] = []

    def take(name: str, default: Any) -> Any:
        value = given.get(name)
        if value is None:
            assumed.append(f"{name}={default}")
            return default
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise TensorkeepError(
                f"config.json: {name} is {value!r}", code="C01", hint="correct it, or give another with --config"
            )
        return value

    shapes = {n: r.shape for n, r in found.items()}
    theta = take("rope_theta", 1e6)
    yarn = {"rope_type": "yarn", **_YARN} if given.get("inference_rope_scaling") is True else None
    known = _geometry(shapes, take, given) | {
        "hidden_act": given.get("hidden_act", "silu"),
        "rms_norm_eps": take("rms_norm_eps", 1e-6 if made == "mm3" else 1e-5),
        "rope_theta": theta,  # transformers 4 reads this and rope_scaling, 5 reads rope_parameters
        "rope_parameters": {"rope_theta": theta, **(yarn or {"rope_type": "default"})},
        "rope_scaling": yarn,
        "max_position_embeddings": take("max_position_embeddings", 32768),
        "tie_word_embeddings": take("tie_word_embeddings", True) if tied else given.get("tie_word_embeddings") is True,
        **{
            f"{word}_token_id": given.get(f"{word}_token_id", number)
            for word, number in (("bos", 1), ("eos", 2), ("pad", 0))
        },
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    kind = GENERATIONS[made]
    if any(".mlp.experts." in n for n in shapes):
        kind = (
            "qwen3_moe" if made == "mm3" else "minimind"
        )  # shared experts beside Llama attention: no class computes this
        known |= _experts(shapes, take, given, made)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    odd = [f"{k} {given[k]} is {known[k]}" for k in sizes if given.get(k) is not None and given[k] != known[k]]
    return {"architectures": [_CLASSES[kind]], "model_type": kind, "minimind_generation": made, **known}, assumed, odd


def _geometry(shapes: Mapping[str, tuple[int, ...]], take: _Take, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the model's sizes off its shapes; the number of heads from the config where no q_norm shows head_dim."""
    vocab, hidden = _matrix(shapes, hf.EMBEDDING)
    queries, keys = _matrix(shapes, f"{_FIRST}q_proj.weight")[0], _matrix(shapes, f"{_FIRST}k_proj.weight")[0]
    norm, told = shapes.get(f"{_FIRST}q_norm.weight"), given.get("head_dim")
    if norm:
        head_dim = norm[0]
    elif isinstance(told, int):
        head_dim = told
    else:
        heads = max(take("num_attention_heads", 8), 1)
        head_dim = 0 if queries % heads else queries // heads
    if head_dim <= 0 or queries % head_dim or keys % head_dim:
        raise TensorkeepError(
            f"q_proj has {queries} rows and k_proj {keys}, which the config does not divide into whole heads",
            code="C01",
            hint="give MiniMind's config of this model: --config config.json",
        )
    dense = shapes.get("model.layers.0.mlp.gate_proj.weight")
    expert = shapes.get("model.layers.0.mlp.experts.0.gate_proj.weight")
    width = (
        dense
        or (given.get("intermediate_size") and (given["intermediate_size"],))
        or expert
        or (64 * math.ceil(hidden * math.pi / 64),)
    )[0]
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": _count(shapes, r"model\.layers\.(\d+)\."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "intermediate_size": width,
    }


def _experts(shapes: Mapping[str, tuple[int, ...]], take: _Take, given: Mapping[str, Any], made: str) -> dict[str, Any]:
    """Return the fields of a mixture of experts, under both names that transformers 4 and 5 read."""
    if made != "mm3":
        names = ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "scoring_func", "norm_topk_prob")
        return {k: given[k] for k in names if k in given}
    count = _count(shapes, r"model\.layers\.0\.mlp\.experts\.(\d+)\.")
    return {
        "num_experts": count,
        "num_local_experts": count,
        "moe_intermediate_size": _matrix(shapes, "model.layers.0.mlp.experts.0.gate_proj.weight")[0],
        "num_experts_per_tok": take("num_experts_per_tok", 1),
        "norm_topk_prob": take("norm_topk_prob", True),
        "router_aux_loss_coef": given.get("router_aux_loss_coef", 5e-4),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    """Return the shape of a matrix that must be there, [rows, columns]."""
    shape = shapes.get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        raise TensorkeepError(
            f"{name} is {'missing' if shape is None else f'of shape {list(shape)}'}: not a whole MiniMind model",
            code="K01",
            hint="name the naming yourself (--from-naming hf), or get the full file",
        )
    return shape[0], shape[1]


def _count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the highest number that the pattern finds in a name."""
    return max((int(m.group(1)) for n in names if (m := re.match(pattern, n))), default=-1) + 1
