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

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, get_type_hints

from tensorkeep.errors import TensorkeepError

NAMES = ("actionformer", "tridet", "temporalmaxer", "causaltad")


@cache
def module(name: str) -> ModuleType:
    """Return the module of a kind.

    Args:
        name: one of `NAMES`.
    """
    return import_module(f"{__name__}.{name}")


def refuse_others(config: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse a projection or head with fields of another kind of detector.

    Args:
        config: the dataclass of the recipe's own kind.
        values: the recipe's `model` section.
        where: what errors name.

    Raises:
        TensorkeepError: It has such fields; all are named, with the kinds that have them and the fields of this one.
    """
    name, own = values.get("kind", "actionformer"), get_type_hints(config)
    for part in ("projection", "head"):
        given, known = values.get(part), get_type_hints(own[part])
        strange = [str(key) for key in given if key not in known] if isinstance(given, Mapping) else []
        if not strange:
            continue
        fields = {other: get_type_hints(get_type_hints(module(other).Config)[part]) for other in NAMES if other != name}
        having = [other for other, there in fields.items() if set(strange) <= set(there)]
        if having:
            what = f"{', '.join(strange)}: of kind {' or '.join(having)}; this recipe's kind is {name}"
            hint = f"kind: {having[0]}, or write the {part} anew with {name}'s own fields: {', '.join(known)}"
            raise TensorkeepError(what, where=f"{where}.{part}", hint=hint)
