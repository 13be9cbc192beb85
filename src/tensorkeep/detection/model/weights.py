"""Load weights into a backbone or detector strictly: all that is missing, unexpected or of another shape is an error.

Files go through the same namings as `tensorkeep convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import identify, opentad, videomae
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str, absent: Iterable[str] = ()) -> None:
    """Copy tensors into a module by name; each side must have all names of the other.

    Args:
        module: changed in place.
        tensors: by the module's own names.
        where: the file they come from, for errors.
        absent: names of the module that `tensors` may lack.

    Raises:
        TensorkeepError: Tensors are missing, unexpected or of another shape; then nothing was changed.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys() - set(absent))
    extra = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{n} {tuple(t.shape)} instead of {tuple(own[n].shape)}"
        for n, t in tensors.items()
        if n in own and own[n].shape != t.shape
    ]
    problems = [("missing", missing), ("unexpected", extra), ("shape differs", shapes)]
    if any(names for _, names in problems):
        what = "; ".join(f"{label}: {', '.join(names[:5])} ({len(names)})" for label, names in problems if names)
        raise TensorkeepError(what, where=where, hint="does the recipe describe this checkpoint?")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def load_videomae(
    vit: nn.Module, source: str | Path | Mapping[str, Tensor], where: str = "VideoMAE checkpoint"
) -> list[str]:
    """Load pretrained VideoMAE weights into a backbone.

    Adapters and LoRA weights are new and keep their values; so do the fixed position table, and `fc_norm` where the
    file has none.

    Args:
        vit: the backbone, changed in place.
        source: a file or folder, or tensors by name, under VideoMAE's, VideoMAEv2's, mmaction's or transformers' names.
        where: what tensors without a file are called in errors.

    Returns:
        Names of the file that a backbone has no place for (classifier, decoder).

    Raises:
        TensorkeepError: A tensor is unknown, missing or of another shape.

    Example:
        >>> load_videomae(detector.backbone, "vit-small-p16_videomae-k400.pth")  # doctest: +SKIP
        ['cls_head.fc_cls.weight', 'cls_head.fc_cls.bias']
    """
    if not isinstance(source, Mapping):
        view, where = read(source), str(source)
        source = {name: view.tensor(stored) for stored, name in identify(view).names.items()}
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    left: list[str] = []
    own = vit.state_dict()
    for stored, tensor in source.items():
        name = stored.removeprefix("module.").removeprefix("model.")
        if name in own and ("adapter" in name.split(".") or name.endswith((".base.weight", ".base.bias"))):
            renamed[name] = tensor  # of a backbone of ours that was saved with its adapters
            continue
        ours, part = opentad.to_hf(name) or videomae.to_hf(name), videomae.third(name)
        if ours is None and opentad.dropped(name) is None and videomae.dropped(name) is None:
            raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint="is this a VideoMAE encoder?")
        if ours is None:
            left.append(name)
        elif part is None:
            renamed[ours] = tensor
        else:
            thirds.setdefault(ours, {})[part] = tensor
    for name, parts in thirds.items():
        if len(parts) != 3:
            raise TensorkeepError(f"{name} lacks its query, key or value", where=where)
        renamed[name] = torch.cat([parts[i] for i in range(3)])
    new = [n for n in own if "adapter" in n.split(".") or n.split(".")[-1] in ("lora_A", "lora_B")]
    bare = {_under_lora(name.removeprefix("backbone."), own): tensor for name, tensor in renamed.items()}
    load_exactly(vit, bare, where, absent=[*new, "pos_embed", "fc_norm.weight", "fc_norm.bias"])
    return left


def _under_lora(name: str, own: Mapping[str, Tensor]) -> str:
    """Return the name that a weight has in the backbone: under LoRA a linear's own weight lies below `base`."""
    path, _, last = name.rpartition(".")
    wrapped = f"{path}.base.{last}"
    return wrapped if name not in own and wrapped in own else name
