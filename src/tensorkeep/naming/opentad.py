"""OpenTAD's and mmaction's names for a detector, to ours and back.

Tensors are kept as they are: only path segments differ. `module.` (DDP) in front of every name of a checkpoint is
a wrapper, not part of the naming; strip it first (`strip_wrapper`).

| OpenTAD | ours |
|---|---|
| backbone.model.backbone.patch_embed.projection.* | backbone.patch_embed.proj.* |
| backbone.model.backbone.blocks.I.mlp.layers.0.0.* | backbone.blocks.I.mlp.fc1.* |
| backbone.model.backbone.blocks.I.mlp.layers.1.* | backbone.blocks.I.mlp.fc2.* |
| backbone.model.backbone.* (the rest) | backbone.* |
| projection.* | projection.* |
| neck.fpn_norms.L.* | neck.norms.L.* |
| rpn_head.* | head.* |

mmaction's VideoMAE files name the same backbone `backbone.*` and add a classifier, which has no place in a detector.
"""

from __future__ import annotations

NAME = "opentad"
Segments = tuple[str, ...]

# longest first: the first prefix that fits decides
PARTS: tuple[tuple[Segments, Segments], ...] = (
    (("backbone", "model", "backbone"), ("backbone",)),
    (("projection",), ("projection",)),
    (("neck", "fpn_norms"), ("neck", "norms")),
    (("rpn_head",), ("head",)),
)
PATCH_EMBED: tuple[Segments, Segments] = (("patch_embed", "projection"), ("patch_embed", "proj"))
MLP: tuple[tuple[Segments, Segments], ...] = (
    (("mlp", "layers", "0", "0"), ("mlp", "fc1")),
    (("mlp", "layers", "1"), ("mlp", "fc2")),
)
DROPPED = {"cls_head": "classifier of an action recognition model; a detector has its own head"}
CHANGED_DTYPES = {"head.loss_normalizer": "int64 in a fresh OpenTAD model, float32 after its first training step"}


def strip_wrapper(name: str) -> str:
    """Without the `module.` that DDP puts in front.

    >>> strip_wrapper("module.rpn_head.cls_head.bias")
    'rpn_head.cls_head.bias'
    """
    return name.removeprefix("module.")


def recognise(name: str) -> bool:
    """Whether a (clean) name is one of an OpenTAD detector."""
    return to_hf(name) is not None


def to_hf(name: str) -> str | None:
    """OpenTAD's name of a detector's tensor to ours; None where it names none.

    >>> to_hf("backbone.model.backbone.blocks.3.mlp.layers.0.0.weight")
    'backbone.blocks.3.mlp.fc1.weight'
    """
    segments = tuple(name.split("."))
    for theirs, ours in PARTS:
        if segments[: len(theirs)] == theirs and len(segments) > len(theirs):
            rest = segments[len(theirs) :]
            return ".".join(ours + (_backbone(rest, forward=True) if ours == ("backbone",) else rest))
    return None


def from_hf(name: str) -> str | None:
    """Our name to OpenTAD's; None where it names nothing of a detector.

    >>> from_hf("head.scale.0.scale")
    'rpn_head.scale.0.scale'
    """
    segments = tuple(name.split("."))
    for theirs, ours in PARTS:
        if segments[: len(ours)] == ours and len(segments) > len(ours):
            rest = segments[len(ours) :]
            return ".".join(theirs + (_backbone(rest, forward=False) if ours == ("backbone",) else rest))
    return None


def from_mmaction(name: str) -> str | None:
    """A name of an mmaction VideoMAE file to ours; None for its classifier (see DROPPED) and for unknown names.

    >>> from_mmaction("backbone.patch_embed.projection.bias")
    'backbone.patch_embed.proj.bias'
    """
    segments = tuple(name.split("."))
    if segments[0] != "backbone" or len(segments) < 2:
        return None
    return ".".join(("backbone", *_backbone(segments[1:], forward=True)))


def to_mmaction(name: str) -> str | None:
    """Our name of a backbone tensor to mmaction's; None for anything else."""
    segments = tuple(name.split("."))
    if segments[0] != "backbone" or len(segments) < 2:
        return None
    return ".".join(("backbone", *_backbone(segments[1:], forward=False)))


def _backbone(segments: Segments, forward: bool) -> Segments:
    """Segments below the backbone: OpenTAD's and mmaction's to ours (`forward`), or back."""
    if segments[0] == "blocks":
        return segments[:2] + _swap(segments[2:], MLP, forward)
    return _swap(segments, (PATCH_EMBED,), forward)


def _swap(segments: Segments, pairs: tuple[tuple[Segments, Segments], ...], forward: bool) -> Segments:
    for theirs, ours in pairs:
        old, new = (theirs, ours) if forward else (ours, theirs)
        if segments[: len(old)] == old:
            return new + segments[len(old) :]
    return segments
