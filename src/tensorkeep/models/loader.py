"""Ask transformers itself what its loader makes of a set of tensors: on the meta device, so names and shapes alone.

Also which modules its quantizers replace, and what the state dict of a loaded model lists: names in memory are not
those in files where transformers 5 stacks experts or renames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tensorkeep.conversion.fit import Misfit, Offer
from tensorkeep.models.refusals import refusals
from tensorkeep.storage.budget import believable
from tensorkeep.storage.record import DTYPES, FROM_TORCH, nbytes


def by_transformers(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> Misfit | None:
    """Let transformers load tensors of these names and shapes, without values, and return what it reports.

    Args:
        config: as config.json has it.
        offers: the tensors by hf name.

    Returns:
        What does not fit; None where transformers is not installed or has no such model.
    """
    found = meta_model(config, offers)
    if found is None:
        return None
    model, info = found
    return Misfit(
        f"its config ({config.get('model_type')})",
        len(model.state_dict()),
        tuple(sorted(map(str, info["missing_keys"]))),
        tuple(sorted(map(str, info["unexpected_keys"]))),
        {str(n): (tuple(a), tuple(b)) for n, a, b in sorted(info["mismatched_keys"])},
    )


def meta_model(config: Mapping[str, Any], offers: Mapping[str, Offer]) -> tuple[Any, dict[str, Any]] | None:
    """Let transformers load tensors of these names and shapes into a model on the meta device.

    Args:
        config: as config.json has it.
        offers: the tensors by hf name.

    Returns:
        The model and transformers' loading info; None where it is not installed or has no such model.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        return None
    if not believable(config, sum(nbytes(offer.dtype, offer.shape) for offer in offers.values())):
        return None
    from tensorkeep.models.language_model import silent

    try:
        made, kind = _kind(config)
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
    return model, info


def quantized_modules(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the modules that transformers builds for codes by a config's quantization_config.

    Args:
        config: as config.json has it.

    Returns:
        Names of modules; None where transformers or the library of the codes is not installed, or refuses the config.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        return None
    from tensorkeep.models.language_model import silent

    if not believable(config):
        return None
    try:
        with silent(), torch.random.fork_rng(devices=[]):
            from transformers.quantizers import AutoHfQuantizer

            made, kind = _kind({k: v for k, v in config.items() if k != "quantization_config"})
            quantizer = AutoHfQuantizer.from_config(config["quantization_config"], pre_quantized=True)
            with torch.device("meta"):
                model = kind(made)
            before = {n: type(m) for n, m in model.named_modules()}
            quantizer.preprocess_model(model, device_map={"": "cpu"}, dtype=torch.bfloat16, checkpoint_files=None)
    except refusals():
        return None
    return frozenset(n for n, m in model.named_modules() if before.get(n, type(m)) is not type(m))


def state_of(config: Mapping[str, Any]) -> dict[str, Offer] | None:
    """Return the tensors that the state dict of a config's live model lists, tied ones under every name.

    Args:
        config: as config.json has it.

    Returns:
        Dtype and shape by name in memory; None where transformers is not installed or has no such model.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        return None
    from tensorkeep.models.language_model import silent

    if not believable(config):
        return None
    try:
        with silent(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            made, kind = _kind(config)
            held = kind(made).state_dict()
    except refusals():
        return None
    return {n: Offer(FROM_TORCH[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in held.items()}


def _kind(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' config object, and the class of the model that the config names."""
    import transformers

    from tensorkeep.models.language_model import silent, with_floats

    named = config.get("architectures")
    with silent():
        made = transformers.AutoConfig.for_model(**with_floats(dict(config)))
    kind: Any = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    return made, kind if kind is not None else transformers.AutoModelForCausalLM._model_mapping[type(made)]


def _hollow(offer: Offer) -> Any:
    """Return a tensor without values; None where torch has no such dtype."""
    spelled = DTYPES[offer.dtype].torch
    if spelled is None or not hasattr(torch, spelled):
        return None
    return torch.empty(offer.shape, dtype=getattr(torch, spelled), device="meta")
