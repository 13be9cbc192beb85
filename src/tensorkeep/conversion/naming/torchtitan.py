"""Naming `torchtitan`: the names of torchtitan 0.3 (`layers.0.attention.qkv_linear.wq.weight`, `lm_head.weight`).

Its families, after torchtitan's own models and state dict adapters: llama3 (complex RoPE on interleaved pairs, so q/k
rows are permuted) and qwen3 (cos/sin RoPE on halves, no permutation; experts stacked) here, the others in
`torchtitan_models`. torchtitan has no model for other architectures, and its loader never asks for tensors its model
lacks: conversions say both by name (K07).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from tensorkeep.conversion.naming import torchtitan_models as models
from tensorkeep.conversion.naming.meta_rows import experts, rows
from tensorkeep.conversion.naming.table import Row, matcher
from tensorkeep.errors import TensorkeepError

NAME = "torchtitan"
LOADERS = ("torchtitan",)
VERSION = "0.3"
EXPERT_BIAS = "moe.expert_bias_E"  # of each sparse layer, in the weights' own state dict
MODEL_TYPES = {"llama": "llama3", "qwen3": "qwen3", "qwen3_moe": "qwen3", **models.MODEL_TYPES}


EXPERTS = experts("routed_experts.inner_experts", "w1_EFD", "w2_EDF", "w3_EFD")
FAMILIES = {
    "llama3": rows("qkv_linear.", "lm_head", [], rope=True),
    "qwen3": rows("qkv_linear.", "lm_head", EXPERTS, rope=False),
    **models.FAMILIES,
}
_PLAIN = ("llama3", "qwen3")  # whose models have no biases
# buffers that eras before 2025-08 stored; torchtitan computes them anew
COMPUTED = ("freqs_cis", "rope_cache", "rope.cache")


_ALL = [row for rows in FAMILIES.values() for row in rows]
_ALL += [row for own in ("deepseek_v3",) for row in models.further(FAMILIES[own], 0, 1)]
_fits = matcher(_ALL)
# what no other family has in its names; towers that see come with a config, which says which text they serve
_MARKS = (
    ("attention.wkv_a.", "deepseek_v3"),
    ("attention.sinks", "gpt_oss"),
    (".attn.in_proj_q.", "qwen3_5_text"),
    ("tok_embeddings.embedding.", "muse_glimmer"),
)


@lru_cache(1 << 14)
def recognise(name: str) -> bool:
    """Whether a (clean) name is one of torchtitan's own."""
    # `norm` and `lm_head` are everybody's; they count once something of our own stands beside them
    return name in COMPUTED or (_fits(name) and not name.startswith("lm_head."))


def table(names: Collection[str], config: Mapping[str, Any] | None) -> list[Row]:
    """Return the rows of the family that the config or the names tell, further layers of a deepseek included.

    Args:
        names: own or hf names.
        config: the model's config, where one is there.

    Raises:
        TensorkeepError: as of `family`.
    """
    named = family(names, dict(config) if config is not None else None)
    layers, count = models.further_layers(config) if named in ("deepseek_v3", "kimi", "kimi_vl") else (0, 0)
    return models.further(FAMILIES[named], layers, count) if count else FAMILIES[named]


def family(names: Iterable[str], config: dict[str, Any] | None) -> str:
    """Tell which family's table holds, from the config and from norms on q and k (own or hf names).

    Raises:
        TensorkeepError: torchtitan has no model for this architecture, or its llama3 has no place for the norms (K07).
    """
    kind = (config or {}).get("model_type")
    names = list(names)
    if isinstance(kind, str) and kind not in MODEL_TYPES and kind != "minimind":
        raise TensorkeepError(
            f"torchtitan has no model for {kind!r} (it has {', '.join(FAMILIES)})",
            hint="keep the hf names: --naming hf, which flame and torchtitan's transformers backend load",
        )
    normed = any(n.endswith(("q_norm.weight", "k_norm.weight")) for n in names)
    named = MODEL_TYPES.get(kind or "") or _by_names(names) or ("qwen3" if normed else "llama3")
    if named == "llama3" and normed:
        raise TensorkeepError(
            "q_norm/k_norm in a llama: torchtitan's llama3 has none and its loader would drop them",
            code="K07",
            hint="keep the hf names (--naming hf), or leave them out by name with --drop '[qk]_norm'",
        )
    return named


def _by_names(names: Iterable[str]) -> str | None:
    """Return the family that one name alone tells, where no config does."""
    return next((family for name in names for mark, family in _MARKS if mark in name), None)


def dropped_by_loader(own: str, named: str) -> bool:
    """Whether torchtitan's loader would leave a tensor of the table out without a word, as it does with every bias.

    Args:
        own: torchtitan's name of the tensor.
        named: the family, a key of FAMILIES.

    Returns:
        True where the model has no place for it (K07).
    """
    return named in _PLAIN and own.endswith(".bias")
