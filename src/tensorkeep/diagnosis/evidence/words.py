"""What a tensor is, by its name."""

from __future__ import annotations

import re

NORM = re.compile(r"(^|[._])(\w*norm\w*|ln|ln_?\w{1,5}|layernorm\w*)\.(weight|bias|gamma|beta|scale)\Z", re.IGNORECASE)


def is_norm(name: str) -> bool:
    """Whether this is a norm's gain or bias.

    >>> is_norm("model.layers.0.input_layernorm.weight"), is_norm("h.0.ln_1.weight"), is_norm("blocks.0.norm1.bias"), is_norm("a.q_proj.weight")
    (True, True, True, False)
    """
    return NORM.search(name) is not None
