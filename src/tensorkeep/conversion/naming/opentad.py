"""Naming `opentad`: OpenTAD's names for a detector (on features or a VideoMAE ViT), and mmaction's for its backbone.

Tensors are kept as they are: only path segments differ. `hf` names are here those of our own detector.

| OpenTAD | ours |
|---|---|
| backbone.model.backbone.patch_embed.projection.* | backbone.patch_embed.proj.* |
| backbone.model.backbone.blocks.I.mlp.layers.0.0.* | backbone.blocks.I.mlp.fc1.* |
| backbone.model.backbone.blocks.I.mlp.layers.1.* | backbone.blocks.I.mlp.fc2.* |
| backbone.model.backbone.{patch_embed,layers,norm3}.* of Re2TAL's reversible Swin | backbone.* |
| backbone.model.backbone.* (the rest, side-tuning's ladders.adapters.K.* too) | backbone.* |
| projection.* | projection.* |
| neck.fpn_norms.L.* | neck.norms.L.* |
| rpn_head.* | head.* |

mmaction's VideoMAE files, which OpenTAD starts from, name the same backbone `backbone.*` and add a classifier, which
has no place in a detector. An output that holds a backbone alone gets mmaction's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tensorkeep.conversion.naming.hf import DETECTOR, HEAD_PARTS, PROJECTION

NAME = "opentad"
Segments = tuple[str, ...]

# longest first: the first prefix that fits decides
_PARTS: tuple[tuple[Segments, Segments], ...] = (
    (("backbone", "model", "backbone"), ("backbone",)),
    (("projection",), ("projection",)),
    (("neck", "fpn_norms"), ("neck", "norms")),
    (("rpn_head",), ("head",)),
)
_MMACTION: tuple[Segments, Segments] = (("backbone",), ("backbone",))
_PATCH_EMBED: tuple[Segments, Segments] = (("patch_embed", "projection"), ("patch_embed", "proj"))
_MLP: tuple[tuple[Segments, Segments], ...] = (
    (("mlp", "layers", "0", "0"), ("mlp", "fc1")),
    (("mlp", "layers", "1"), ("mlp", "fc2")),
)
# what only OpenTAD has, or only an mmaction backbone
_MARKS = ("backbone.model.backbone.", "neck.fpn_norms.", "rpn_head.")
KNOWN = re.compile(
    r"backbone\.(model\.backbone\.)?(pos_embed|patch_embed\.projection|fc_norm|ladders\.adapters\.\d+"
    r"|blocks\.\d+\.(norm[12]|attn|mlp\.layers|adapter))\b"
    r"|backbone\.model\.backbone\.(patch_embed\.(proj|norm)|norm3|layers\.\d+\.(blocks\.\d+\.inv_block|downsample))\b"
    rf"|{PROJECTION}|neck\.fpn_norms\.\d+\b|rpn_head\.{HEAD_PARTS}|cls_head\.fc_cls\."
)
DROPPED = {"cls_head": "classifier of an action recognition model; a detector has its own head"}
CHANGED_DTYPES = {"head.loss_normalizer": "int64 in a fresh OpenTAD model, float32 after its first training step"}
# OpenTAD loads into a model wrapped by DDP, and asks for the average where its config has one
CHECKPOINT_ROOTS = ("state_dict.module", "state_dict_ema.module")
PRETRAINED_ROOTS = ("state_dict",)
DEQUANTIZED = "dequantized"  # an entry of ours beside the states: floats that 4- or 8-bit weights stood for


def strip_wrapper(name: str) -> str:
    """Remove the `module.` that DDP puts in front of a name.

    Args:
        name: a stored name.

    Returns:
        The name without it.

    Example:
        >>> strip_wrapper("module.rpn_head.cls_head.bias")
        'rpn_head.cls_head.bias'
    """
    return name.removeprefix("module.")


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of an OpenTAD detector that is built here, or of an mmaction VideoMAE.

    >>> recognise("rpn_head.cls_head.bias"), recognise("rpn_head.rpn_cls.weight")
    (True, False)
    """
    return KNOWN.match(name) is not None


def holds(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these tensors are really OpenTAD's: many frameworks have a `backbone` and a `projection`."""
    return (
        any(n.startswith(_MARKS) for n in shapes) or len(shapes.get("backbone.patch_embed.projection.weight", ())) == 5
    )


def dropped(name: str) -> str | None:
    """Return why a tensor has no place in a detector.

    Args:
        name: a clean name of an OpenTAD or mmaction file.

    Returns:
        The reason; None where the tensor has a place.
    """
    return DROPPED.get(name.partition(".")[0])


def to_hf(name: str) -> str | None:
    """Turn OpenTAD's (or mmaction's) name of a detector's tensor into ours.

    Args:
        name: a clean name of the file.

    Returns:
        Our name; None where the name is none of theirs.

    Example:
        >>> to_hf("backbone.model.backbone.blocks.3.mlp.layers.0.0.weight")
        'backbone.blocks.3.mlp.fc1.weight'
        >>> to_hf("backbone.patch_embed.projection.bias")
        'backbone.patch_embed.proj.bias'
    """
    if not recognise(name):
        return None
    segments = tuple(name.split("."))
    for theirs, ours in (*_PARTS, _MMACTION):
        if segments[: len(theirs)] == theirs:
            rest = segments[len(theirs) :]
            return ".".join(ours + (backbone_segments(rest, forward=True) if ours == ("backbone",) else rest))
    return None


def from_hf(name: str, backbone_only: bool = False, swin: bool = False) -> str | None:
    """Turn our name of a detector's tensor into OpenTAD's.

    Args:
        name: our name.
        backbone_only: give mmaction's name of a backbone instead.
        swin: whether the backbone is Re2TAL's Swin, whose names OpenTAD and mmaction spell as here.

    Returns:
        The name in their files; None where they have no such tensor.

    Example:
        >>> from_hf("head.scale.0.scale")
        'rpn_head.scale.0.scale'
        >>> from_hf("backbone.blocks.0.attn.qkv.lora_A") is None
        True
    """
    segments = tuple(name.split("."))
    if not DETECTOR.match(name) or {"lora_A", "lora_B", "base"} & set(segments):
        return None
    for theirs, ours in (_MMACTION,) if backbone_only else _PARTS:
        if segments[: len(ours)] == ours:
            rest = segments[len(ours) :]
            respelt = ours == ("backbone",) and not swin
            made = ".".join(theirs + (backbone_segments(rest, forward=False) if respelt else rest))
            return made if recognise(made) or (swin and backbone_only) else None  # it has no V-JEPA 2, no InternVideo2
    return None


def renamer(names: Iterable[str]) -> Any:
    """Return the function that names tensors (our names) for OpenTAD, or for mmaction where all are a backbone's."""
    names = list(names)
    backbone_only = all(n.startswith("backbone.") for n in names)
    swin = any(n.startswith("backbone.layers.") for n in names)
    return lambda name: from_hf(name, backbone_only, swin)


def backbone_segments(segments: Segments, forward: bool) -> Segments:
    """Rename the path segments below a backbone, between OpenTAD's (and mmaction's) spelling and ours.

    Args:
        segments: the name's segments after the backbone.
        forward: True from theirs to ours, False from ours to theirs.

    Returns:
        The segments in the other spelling.

    Example:
        >>> backbone_segments(("blocks", "3", "mlp", "fc1", "weight", "absmax"), forward=False)
        ('blocks', '3', 'mlp', 'layers', '0', '0', 'weight', 'absmax')
    """
    if segments[0] == "blocks":
        return segments[:2] + _swap(segments[2:], _MLP, forward)
    return _swap(segments, (_PATCH_EMBED,), forward)


def _swap(segments: Segments, pairs: tuple[tuple[Segments, Segments], ...], forward: bool) -> Segments:
    """Replace the first prefix of `segments` that one of the pairs has."""
    for theirs, ours in pairs:
        old, new = (theirs, ours) if forward else (ours, theirs)
        if segments[: len(old)] == old:
            return new + segments[len(old) :]
    return segments
