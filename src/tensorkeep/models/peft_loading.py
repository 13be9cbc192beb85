"""Ask PEFT itself which tensors of an adapter it would leave out when it loads it: on the meta device, names alone.

With transformers 5 PEFT turns the targets of mixtures of experts into stacked parameters; what the same words named
beside the experts (a dense layer's `gate_proj`, shared experts) is then no target, and its tensors are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from tensorkeep.conversion.fit import Offer
from tensorkeep.models.loader import meta_model
from tensorkeep.models.refusals import refusals


def left_out_by_peft(
    config: Mapping[str, Any], offers: Mapping[str, Offer], document: Mapping[str, Any], tensors: Mapping[str, Offer]
) -> tuple[str, list[str]] | None:
    """Let PEFT load an adapter onto the base's model, without values, and return what it does not take.

    Args:
        config: the base's config.json.
        offers: the base's tensors by hf name.
        document: the adapter's config.
        tensors: the adapter's tensors by stored name.

    Returns:
        PEFT's version, and the names that it leaves out; None where PEFT is not installed or cannot load it at all.
    """
    try:
        import peft
    except ImportError:
        return None
    found = meta_model(config, offers)
    if found is None or document.get("peft_type") != "LORA":
        return None
    known = {f for f in peft.LoraConfig.__dataclass_fields__ if document.get(f) is not None}
    given = {k: document[k] for k in known - {"peft_type", "auto_mapping", "runtime_config"}}
    state = {n: torch.empty(o.shape, device="meta") for n, o in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(found[0], peft.LoraConfig(**given), low_cpu_mem_usage=True)
            taken = peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    except refusals():
        return None
    unexpected = {name.replace(".default", "") for name in taken.unexpected_keys}
    return peft.__version__, sorted(n for n in tensors if n in unexpected)
