"""What the name of a tensor says: whether it belongs to a norm, and to which layer."""

from __future__ import annotations

import re

NORM = re.compile(r"(^|[._])(\w*norm\w*|ln|ln_?\w{1,5}|layernorm\w*)\.(weight|bias|gamma|beta|scale)\Z", re.IGNORECASE)


def is_norm(name: str) -> bool:
    """Say whether this is a norm's gain or bias.

    >>> [is_norm(n) for n in ("model.layers.0.input_layernorm.weight", "h.0.ln_1.weight", "blocks.0.norm1.bias")]
    [True, True, True]
    >>> is_norm("a.q_proj.weight")
    False
    """
    return NORM.search(name) is not None


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Split a name at its first number into stack, layer number and the name within the layer.

    >>> layer_of("model.layers.3.mlp.experts.7.w")
    ('model.layers.', 3, 'mlp.experts.7.w')
    """
    found = re.match(r"((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.+)\Z", name)
    return (found[1], int(found[2]), found[3]) if found else None
