"""Work out, from a config, how rows of q and k are reordered between RoPE layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorkeep.conversion.plan import RowPermutation
from tensorkeep.errors import TensorkeepError

# Meta's and MiniMind's first names of the same fields
OLD_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}


def rope_rows(config: Mapping[str, Any] | None, to: str, name: str, shape: tuple[int, ...]) -> RowPermutation:
    """Return the row permutation of q and k that this config asks for.

    Args:
        config: as config.json has it (MiniMind's old field names too); head_dim is derived where it is not given.
        to: the layout to reach, "pairs" (Meta, torchtitan's llama3, MiniMind of early 2025) or "half" (transformers).
        name: the tensor's name, for errors.
        shape: the tensor's shape; its rows must be whole heads.

    Returns:
        The permutation of the rows of each head.

    Raises:
        TensorkeepError: C03 without a config, since shapes do not tell the size of a head; C01 where rows are not whole
            heads of that size.
    """
    given = dict(config or {})
    own = {**given, **{new: given[old] for old, new in OLD_FIELDS.items() if old in given}}
    heads = own.get("num_attention_heads")
    hidden = own.get("hidden_size")
    head_dim = own.get("head_dim") or (
        hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 else 0
    )
    if not isinstance(head_dim, int) or head_dim <= 0:
        raise TensorkeepError(
            f"{name}: its rows follow another RoPE layout, and without a config.json the size of a head is unknown",
            code="C03",
            hint="add the model's folder or config: --config DIR_OR_FILE",
        )
    rotary = int(head_dim * partial_rotary(own))
    if rotary % 2 or rotary > head_dim or not shape or shape[0] % head_dim:
        raise TensorkeepError(
            f"{name}: {shape[0] if shape else 0} rows are not whole heads of {head_dim} (rotary {rotary})",
            code="C01",
            hint="is this the config of another model?",
        )
    return RowPermutation(head_dim, rotary, to)


def section(config: Mapping[str, Any] | None, scope: str = "") -> Mapping[str, Any]:
    """Return the part of a config that describes one model: the named one, or that of the text where there are several.

    Args:
        config: as config.json has it.
        scope: a section's name; "" for the text model's.
    """
    given = config or {}
    nested = given.get(scope or "text_config")
    if isinstance(nested, Mapping) and (scope or "num_attention_heads" not in given):
        return nested
    return given if not scope else {}


def partial_rotary(config: Mapping[str, Any]) -> float:
    """Return the fraction of a head's rows that RoPE turns.

    Args:
        config: as config.json has it; transformers 4 keeps the fraction as a field of its own, 5 in `rope_parameters`.

    Returns:
        A number in (0, 1]; 1 where the config says nothing.
    """
    nested = config.get("rope_parameters")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("partial_rotary_factor", "rotary_pct"):  # GPT-NeoX's word
            value = place.get(key)
            if isinstance(value, (int, float)) and 0 < value <= 1:
                return float(value)
    return 1.0
