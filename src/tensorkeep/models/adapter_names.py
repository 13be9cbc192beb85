"""Tell the tensors of PEFT's adapters in a live model, and the names that PEFT's own files give them.

PEFT's layers say themselves which of their parts are adapters (`adapter_layer_names`); each part holds one tensor or
module for each adapter, under the adapter's name, which its files leave out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from tensorkeep.models.tensors import Held

_ALWAYS = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "modules_to_save",
    "ia3_l",
)
_WHOLE = "modules_to_save"  # a copy of the layer itself, which files keep under the layer's own name


def parts_of(model: nn.Module) -> frozenset[str]:
    """Return the names of modules and dicts that hold adapters in this model.

    Args:
        model: the model, with PEFT's or our adapters on it.
    """
    named = {
        str(n)
        for m in model.modules()
        for n in (*(getattr(m, "adapter_layer_names", None) or ()), *(getattr(m, "other_param_names", None) or ()))
    }
    return frozenset(named | set(_ALWAYS))


def is_adapter(name: str, parts: Collection[str]) -> bool:
    """Tell whether a live name lies in an adapter.

    Args:
        name: a parameter's or buffer's name.
        parts: names of modules and dicts that hold adapters, from `parts_of`.

    Example:
        >>> is_adapter("layers.0.q_proj.lora_A.default.weight", {"lora_A"})
        True
    """
    return any(segment in parts for segment in name.split("."))


def in_files(model: nn.Module, tensors: list[Held], stored: Collection[str]) -> list[Held]:
    """Return the tensors of a model that an adapter's file is about, under the file's names.

    Args:
        model: a live model with adapters of PEFT.
        tensors: its tensors.
        stored: the file's names, without wrappers.

    Returns:
        The tensors of the adapters in use, and others that the file holds as well (an enlarged embedding).
    """
    parts, active = parts_of(model), _active(model)
    out: list[Held] = []
    taken: set[str] = set()
    for item in tensors:
        name = _file_name(item.name, parts, active, stored)
        if name is not None:
            taken.add(name)
            out.append(Held(name, item.module, item.tensor))
    for item in tensors:
        module, _, leaf = item.name.rpartition(".")
        name = next((n for n in (item.name, f"{module}.base_layer.{leaf}") if n in stored), None)
        if name is not None and name not in taken and not is_adapter(item.name, parts):
            out.append(Held(name, item.module, item.tensor))
    return out


def _active(model: nn.Module) -> set[str]:
    """Return the names of the adapters in use; empty where the model does not say."""
    if not getattr(model, "peft_config", None):  # transformers' models have the attribute below, and raise without one
        return set()
    found: Any = getattr(model, "active_adapters", None)
    found = found() if callable(found) else found
    return {found} if isinstance(found, str) else {str(f) for f in found or ()}


def _file_name(name: str, parts: Collection[str], active: set[str], stored: Collection[str]) -> str | None:
    """Return a file's name of an adapter tensor; None for one that is no adapter's, or of an adapter not in use."""
    segments = name.split(".")
    at = next((i for i, s in enumerate(segments) if s in parts), None)
    if at is None:
        return None
    whose = segments[at + 1] if at + 1 < len(segments) else ""
    if active and whose not in active and whose not in ("weight", "bias", ""):
        return None
    rest = segments[at + 2 :] if whose not in ("weight", "bias", "") else segments[at + 1 :]
    kept = segments[:at] if segments[at] == _WHOLE else segments[: at + 1]
    made = ".".join([*kept, *rest])
    short = made.removesuffix(".weight")  # of DoRA's magnitudes files keep the bare name
    return short if made not in stored and short in stored else made
