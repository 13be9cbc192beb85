"""Video networks that a detector may stand on: one file a kind, one line in `BACKBONES`.

A kind's module has:

- `Backbone(config, checkpointing)`: a `VideoBackbone`; mostly a `VisionTransformer` that overrides what differs;
- `own_name(name)`: the name in the backbone of a tensor of the published files; None where it has none;
- `dropped(name)`: why a tensor of those files has no place in a backbone; None where it has one or is unknown;
- `third(name)`: 0, 1 or 2 where a file stores query, key and value apart, and a tensor is that third of our fused rows;
- `joined(tensors, config)`: renamed tensors as the backbone has them, where a file's are stored otherwise;
- `STATED`: field of the shape (`VitConfig`) -> its name in transformers' config of the model type that is called as the
  kind.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from tensorkeep.errors import TensorkeepError, near_misses

BACKBONES = {
    "videomae": "tensorkeep.detection.backbones.videomae",
    "vjepa2": "tensorkeep.detection.backbones.vjepa2",
    "internvideo2": "tensorkeep.detection.backbones.internvideo2",
    "reversible_swin": "tensorkeep.detection.backbones.reversible_swin",
}


def backbone_module(kind: str) -> ModuleType:
    """Return the module of a kind of backbone.

    Args:
        kind: a key of `BACKBONES`.

    Raises:
        TensorkeepError: There is no such kind.
    """
    if kind not in BACKBONES:
        hint = near_misses(kind, BACKBONES) or f"one of {', '.join(BACKBONES)}"
        raise TensorkeepError(f"unknown backbone {kind!r}", where="model.backbone.kind", hint=hint)
    return importlib.import_module(BACKBONES[kind])
