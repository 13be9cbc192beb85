"""Kinds of detectors, one file each: what lies between the features and the detections.

A detector is added by its file here and its name in `NAMES`; what OpenTAD's files call its tensors is in
`conversion.naming`. A module has:

    Config                                   the dataclass of a recipe's `model` section, a `DetectorConfig`
    OPENTAD                                  the type that OpenTAD's configs give it
    build(config)                            its projection and its head, as modules
    padded_length(length, config, training)  the grid steps that features of `length` steps are padded to
    halve_mask(mask)                         the mask of valid steps of the next level
    from_opentad(model)                      a Config without a backbone, of the `model` dict of an OpenTAD config
    FIXED                                    settings of `post_processing` that OpenTAD fixes, where there are any
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

NAMES = ("actionformer", "tridet", "temporalmaxer", "causaltad")


@cache
def module(name: str) -> ModuleType:
    """Return the module of a kind.

    Args:
        name: one of `NAMES`.
    """
    return import_module(f"{__name__}.{name}")
