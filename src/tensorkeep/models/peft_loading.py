"""Ask PEFT itself which tensors of an adapter it would leave out when it loads it: on the meta device, names alone.

With transformers 5 PEFT turns the targets of mixtures of experts into stacked parameters; what the same words named
beside the experts (a dense layer's `gate_proj`, shared experts) is then no target, and its tensors are dropped.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch

from tensorkeep.conversion.fit import Offer
from tensorkeep.formats.view import StateView
from tensorkeep.models.language_model import silent
from tensorkeep.models.loader import meta_model
from tensorkeep.models.refusals import refusals

# what says where an adapter sits; the rest of a config may name modules to import and starts to compute
_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "layers_to_transform",
    "layers_pattern",
)


def _texts(value: Any) -> list[str]:
    """Return the texts in a field of a config, which PEFT may take as regular expressions."""
    return [v for v in (value if isinstance(value, (list, dict)) else [value]) if isinstance(v, str)]


def _calm(regex: str) -> bool:
    """Whether an expression out of an untrusted config cannot keep the matcher busy: few repeats, none of a group."""
    return len(regex) <= 200 and len(re.findall(r"[*+{]", regex)) <= 3 and not re.search(r"\)[*+?{]", regex)


def left_out_by_peft(
    base: StateView, document: Mapping[str, Any], adapter: StateView, names: Collection[str]
) -> tuple[str, list[str]] | None:
    """Let PEFT load an adapter onto the base's model, without values, and return what it does not take.

    Args:
        base: the base; without experts nothing is left out, and PEFT is not asked.
        document: the adapter's config.
        adapter: the adapter.
        names: the stored names of its low-rank pairs.

    Returns:
        PEFT's version, and the names that it leaves out; None where it leaves out none, is not installed, or cannot
        load the adapter at all.
    """
    if base.config is None or document.get("peft_type") != "LORA" or not any(".experts." in name for name in base):
        return None
    try:
        with silent():  # PEFT imports bitsandbytes, which tells of kernels that it cannot load
            import peft
    except ImportError:
        return None
    found = meta_model(base.config, {n: Offer(r.dtype, r.shape) for n, r in base.items()})
    if found is None:
        return None
    given = {k: document[k] for k in _FIELDS if document.get(k) is not None}
    if not all(_calm(text) for value in given.values() for text in _texts(value)):
        return None
    state = {n: torch.empty(adapter[n].shape, device="meta") for n in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(found[0], peft.LoraConfig(**given), low_cpu_mem_usage=True)
            taken = peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    except refusals():
        return None
    unexpected = {name.replace(".default", "") for name in taken.unexpected_keys}
    lost = sorted(n for n in names if n in unexpected)
    return (str(peft.__version__), lost) if lost else None
