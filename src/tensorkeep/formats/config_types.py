"""A model's config as it may be believed: fields that every architecture spells alike have the type they must have.

A config comes from strangers, and its fields are computed with all over. What has another type is left out here, once,
and said (C01); transformers refuses such a config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_WHOLE = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size intermediate_size head_dim "
    "num_experts num_local_experts moe_intermediate_size decoder_sparse_step max_position_embeddings"
).split()
_NONE = ("max_position_embeddings", "num_experts", "num_local_experts")  # -1 is none, or no limit, of these
_MOST = 1 << 25  # positions that a float may say: larger ones are no numbers of a model
_NUMBER = ("rope_theta", "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps")
_FLAG = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_TEXT = ("model_type", "_name_or_path", "transformers_version")
_MAPPING = ("rope_scaling", "rope_parameters", "quantization_config", "text_config", "vision_config")
_LIST = ("architectures", "mlp_only_layers", "layer_types")


def believed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the fields of a wrong type, those of the configs inside it too.

    Args:
        config: what config.json holds.

    Example:
        >>> believed({"model_type": "llama", "num_hidden_layers": "two"})
        {'model_type': 'llama'}
    """
    kept = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config":
            kept[key] = believed(value)
        elif _wanted(key, value) is None and not (key in _WHOLE and isinstance(value, (list, Mapping, float))):
            kept[key] = value
    return kept


def lists_of(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the fields of a config that are lists of whole numbers, one for each layer, where others have a number.

    Args:
        config: what config.json holds.
    """
    return {k: v for k, v in config.items() if k in _WHOLE and isinstance(v, list) and _wanted(k, v) is None}


def odd_fields(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield each field of a wrong type: its dotted name, what it is, and what it should be.

    Args:
        config: what config.json holds.
        inside: the dotted name of the config that it is part of.

    Example:
        >>> list(odd_fields({"text_config": {"num_hidden_layers": "two"}}))
        [('text_config.num_hidden_layers', 'two', 'a whole number')]
    """
    for key, value in config.items():
        name = f"{inside}.{key}" if inside else str(key)
        wanted = _wanted(key, value)
        if wanted is not None:
            yield name, value, wanted
        elif isinstance(value, Mapping) and key.endswith("_config") and key != "quantization_config":
            yield from odd_fields(value, name)


def _wanted(key: str, value: Any) -> str | None:
    """Say what a field should be; None where it is that, is null, or where any type may stand."""
    if value is None:
        return None
    plain = isinstance(value, int) and not isinstance(value, bool)
    if key in _WHOLE:  # some models have one for each layer, or for each part (LXMERT)
        many = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        whole = isinstance(value, float) and value.is_integer() and abs(value) < _MOST
        plain = plain or whole  # 1200.0: Music Flamingo
        if not (plain or (many and all(type(v) is int for v in many))):
            return "a whole number"
        return "a whole number from 0 on" if min(many) < (-1 if key in _NONE else 0) else None
    if key in _NUMBER:
        return None if plain or isinstance(value, float) else "a number"
    for keys, kind, spoken in (
        (_FLAG, bool, "true or false"),
        (_TEXT, str, "text"),
        (_MAPPING, Mapping, "an object"),
        (_LIST, list, "a list"),
    ):
        if key in keys:
            return None if isinstance(value, kind) else spoken
    return None
