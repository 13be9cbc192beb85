"""Ask transformers itself what its loader makes of a set of tensors: on the meta device, so names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tensorkeep.conversion.fit import Misfit, Offer
from tensorkeep.models.refusals import refusals
from tensorkeep.storage.budget import believable
from tensorkeep.storage.record import DTYPES, nbytes


def by_transformers(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> Misfit | None:
    """Let transformers load tensors of these names and shapes, without values, and return what it reports.

    Args:
        config: as config.json has it.
        offers: the tensors by hf name.

    Returns:
        What does not fit; None where transformers is not installed or has no such model.
    """
    try:
        import transformers
    except ImportError:
        return None
    if not believable(config, sum(nbytes(offer.dtype, offer.shape) for offer in offers.values())):
        return None
    from tensorkeep.models.language_model import silent, with_floats

    named = config.get("architectures")
    try:
        with silent():
            made = transformers.AutoConfig.for_model(**with_floats(dict(config)))
        kind: Any = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
        if kind is None:
            kind = transformers.AutoModelForCausalLM._model_mapping[type(made)]
        state = {n: _hollow(offer) for n, offer in offers.items()}
        if any(t is None for t in state.values()):
            return None
        with torch.random.fork_rng(devices=[]), silent():
            model, info = kind.from_pretrained(
                None,
                config=made,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,  # they are reported, and refused by whoever asked
                output_loading_info=True,
            )
    except refusals():
        return None
    return Misfit(
        f"its config ({config.get('model_type')})",
        len(model.state_dict()),
        tuple(sorted(map(str, info["missing_keys"]))),
        tuple(sorted(map(str, info["unexpected_keys"]))),
        {str(n): (tuple(a), tuple(b)) for n, a, b in sorted(info["mismatched_keys"])},
    )


def _hollow(offer: Offer) -> Any:
    """Return a tensor without values; None where torch has no such dtype."""
    spelled = DTYPES[offer.dtype].torch
    if spelled is None or not hasattr(torch, spelled):
        return None
    return torch.empty(offer.shape, dtype=getattr(torch, spelled), device="meta")
