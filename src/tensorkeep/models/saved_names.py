"""How transformers 5 would save a live tensor: some models are renamed or rearranged between file and memory.

GPT-NeoX's `lm_head` is `embed_out` in files, experts are stacked in memory. The library's own way back is asked, one
tensor at a time; transformers 4 and other frameworks have none, and names then stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tensorkeep.models.buffers import REFUSALS, transformers_roots


def as_saved(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What files hold of one tensor, by name; {} where nobody converts it.

    `tensor` may be on the meta device: then only names and shapes are told.
    """
    revert: Callable[..., Any] | None = getattr(
        sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None
    )
    root = next(transformers_roots(model), None)
    if revert is None or root is None or root[0]:
        return {}
    try:
        made: dict[str, Tensor] = revert(root[1], {name: tensor})
    except REFUSALS:
        return {}
    return {} if made.keys() == {name} else {n: t for n, t in made.items() if isinstance(t, Tensor)}


def renamed(model: nn.Module, name: str, tensor: Tensor) -> str | None:
    """The file's name for a tensor that is only renamed; None where it keeps its name or is rearranged."""
    probe = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    probe = probe.detach().to("meta")
    made = as_saved(model, name, probe)
    (other,) = made if len(made) == 1 else (None,)
    return other if other is not None and made[other] is probe else None
