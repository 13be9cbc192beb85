"""Ask transformers 5 how it would save a live tensor: some models rename or rearrange tensors between file and memory.

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
    """Return the tensors that a file would hold for one live tensor of a transformers 5 model.

    Args:
        model: the live model.
        name: the tensor's name in it.
        tensor: the tensor; on the meta device only names and shapes are told.

    Returns:
        The file's tensors by name; empty where the library saves the tensor under its own name, or cannot say.
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
    """Return the file's name of a tensor that is saved under another name.

    Args:
        model: the live model.
        name: the tensor's name in it.
        tensor: the tensor.

    Returns:
        The other name; None where the tensor keeps its name or is rearranged.
    """
    probe = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    probe = probe.detach().to("meta")
    made = as_saved(model, name, probe)
    (other,) = made if len(made) == 1 else (None,)
    return other if other is not None and made[other] is probe else None


def names_in_files(model: nn.Module) -> dict[str, str]:
    """Return the file's name of every tensor of a model that is saved whole under another name.

    Args:
        model: a live model; on the meta device is enough.
    """
    found = ((name, renamed(model, name, tensor)) for name, tensor in model.state_dict().items())
    return {name: other for name, other in found if other is not None}


def all_as_saved(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a file of transformers 5 would hold for a whole state: renamed, experts taken apart.

    Args:
        model: the live model.
        state: its tensors by live name.

    Returns:
        The tensors by the file's names; the state itself where the library saves it as it is, or cannot say.
    """
    revert: Callable[..., Any] | None = getattr(
        sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None
    )
    root = next(transformers_roots(model), None)
    if revert is None or root is None or root[0]:
        return state
    try:
        made: dict[str, Tensor] = revert(root[1], dict(state))
    except REFUSALS:
        return state
    return made
