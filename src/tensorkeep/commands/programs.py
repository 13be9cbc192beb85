"""Which programs are installed and can be asked what they make of a planned checkpoint; imported only when asked."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from tensorkeep.conversion.targets import Programs
from tensorkeep.errors import TensorkeepError


def installed() -> Programs:
    """Return what can be asked here; a program that is not installed is None."""
    versions = {word: found for word in ("transformers", "peft", "torch") if (found := _version(word))}
    torch = "torch" in versions
    transformers = torch and "transformers" in versions
    return Programs(
        versions,
        loads=loads if transformers else None,
        quantizes=_quantizes if transformers else None,
        holds=_holds if transformers else None,
        adapts=_adapts if torch and "peft" in versions else None,
        detects=_detects if torch else None,
    )


def _version(word: str) -> str:
    """The version of an installed package; empty where it is not there."""
    try:
        return importlib.metadata.version(word)
    except importlib.metadata.PackageNotFoundError:
        return ""


def loads(config: Any, offers: Any) -> Any:
    """What transformers says of these tensors; None where it is not installed, so that the table's word is all."""
    try:
        from tensorkeep.models.loader import by_transformers
    except ImportError:
        return None
    return by_transformers(config, offers)


def _quantizes(config: Any) -> Any:
    from tensorkeep.models.loader import quantized_modules

    return quantized_modules(config)


def _holds(config: Any) -> Any:
    from tensorkeep.models.loader import state_of

    return state_of(config)


def _adapts(config: Any, offers: Any) -> Any:
    from tensorkeep.models.adapter_loader import by_peft

    return by_peft(config, offers)


def _detects(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]] | None:
    """The tensors of the detector that these shapes are of, read off as a conversion reads its recipe off."""
    import torch
    import yaml

    from tensorkeep.conversion.naming.opentad_recipe import read_off, readable
    from tensorkeep.detection.model.config import DetectorConfig
    from tensorkeep.detection.model.detector import Detector
    from tensorkeep.training.schema import from_mapping

    if not readable(shapes):
        return None
    try:
        section = yaml.safe_load(read_off(shapes)[0])["model"]
        with torch.device("meta"):
            held = Detector(from_mapping(DetectorConfig, section, "recipe")).state_dict()
    except TensorkeepError:
        return None
    return {n: tuple(t.shape) for n, t in held.items()}
