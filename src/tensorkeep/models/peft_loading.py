"""Ask PEFT itself which tensors of an adapter it would leave out when it loads it: on the meta device, names alone.

With transformers 5 PEFT turns the targets of mixtures of experts into stacked parameters; what the same words named
beside the experts (a dense layer's `gate_proj`, shared experts) is then no target, and its tensors are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch

from tensorkeep.conversion.fit import Offer
from tensorkeep.formats.view import StateView
from tensorkeep.models.loader import meta_model
from tensorkeep.models.refusals import refusals


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
        import peft
    except ImportError:
        return None
    found = meta_model(base.config, {n: Offer(r.dtype, r.shape) for n, r in base.items()})
    if found is None:
        return None
    known = {f for f in peft.LoraConfig.__dataclass_fields__ if document.get(f) is not None}
    given = {k: document[k] for k in known - {"peft_type", "auto_mapping", "runtime_config"}}
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
