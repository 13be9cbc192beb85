"""Load weights into a backbone or detector strictly: all that is missing, unexpected or of another shape is an error.

Files go through the same namings as `tensorkeep convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tensorkeep.conversion.naming import identify
from tensorkeep.detection.backbones import backbone_module
from tensorkeep.detection.model.config import is_added
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView, read


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


def load_backbone(
    vit: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    where: str = "checkpoint",
    shapes_only: bool = False,
) -> list[str]:
    """Load pretrained weights into a backbone, from the files of its kind.

    Adapters and LoRA weights are new and keep their values; so do the fixed position table, and `fc_norm` where the
    file has none.

    Args:
        vit: the backbone, changed in place.
        source: a file or folder, or tensors by name, under the names that its kind knows (`detection/backbones`).
        where: what tensors without a file are called in errors.
        shapes_only: read no data of the file; `vit` must be on the meta device.

    Returns:
        Names of the file that a backbone has no place for (classifier, decoder).

    Raises:
        TensorkeepError: A tensor is unknown, missing or of another shape, or a `config.json` beside the weights says
            something else of the shape than the recipe.

    Example:
        >>> load_backbone(detector.backbone, "vit-small-p16_videomae-k400.pth")  # doctest: +SKIP
        ['cls_head.fc_cls.weight', 'cls_head.fc_cls.bias']
    """
    word = str(getattr(vit, "kind", "videomae"))
    kind = backbone_module(word)
    if not isinstance(source, Mapping):
        view, where = read(source), str(source)
        _compare(vit, kind, view, where)
        source = {name: stored_tensor(view, stored, shapes_only) for stored, name in identify(view).names.items()}
    renamed, left = _renamed(vit, kind, word, source, where)
    if hasattr(kind, "joined"):
        renamed = kind.joined(renamed, vit.config)
    own = vit.state_dict()
    new = [n for n in own if is_added(n)]
    fixed = [n for n, _ in vit.named_buffers() if n == "pos_embed"]
    bare = {_under_lora(name, own): tensor for name, tensor in renamed.items()}
    load_exactly(vit, bare, where, absent=[*new, *fixed, "fc_norm.weight", "fc_norm.bias"])
    return left


def _renamed(
    vit: nn.Module, kind: ModuleType, word: str, source: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return a file's tensors by the backbone's names, and the names that have no place in it."""
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    left: list[str] = []
    own = vit.state_dict()
    for stored, tensor in source.items():
        name = stored.removeprefix("module.").removeprefix("model.")
        if name in own and (is_added(name) or name.endswith((".base.weight", ".base.bias"))):
            renamed[name] = tensor  # of a backbone of ours that was saved with its adapters
            continue
        ours = kind.own_name(name)
        part = kind.third(name) if hasattr(kind, "third") else None
        if ours is None and kind.dropped(name) is None:
            hint = f"is this {word}? another kind of backbone is named by model.backbone.kind"
            raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint=hint)
        if ours is None or (ours.startswith("fc_norm.") and ours not in own):
            left.append(name)
        elif part is None:
            renamed[ours] = tensor
        else:
            thirds.setdefault(ours, {})[part] = tensor
    for name, parts in thirds.items():
        if len(parts) != 3:
            raise TensorkeepError(f"{name} lacks its query, key or value", where=where)
        renamed[name] = torch.cat([parts[i] for i in range(3)])
    return renamed, left


def stored_tensor(view: StateView, name: str, shapes_only: bool) -> Tensor:
    """Return a tensor of a view, or one on the meta device of its shape.

    Args:
        view: the opened file.
        name: as it is stored.
        shapes_only: whether no data is read.
    """
    return torch.empty(view[name].shape, device="meta") if shapes_only else view.tensor(name)


def load_videomae(
    vit: nn.Module, source: str | Path | Mapping[str, Tensor], where: str = "VideoMAE checkpoint"
) -> list[str]:
    """Load pretrained VideoMAE weights into a backbone.

    Args:
        vit: the backbone, changed in place.
        source: a file or folder, or tensors by name, under VideoMAE's, VideoMAEv2's, mmaction's or transformers' names.
        where: what tensors without a file are called in errors.

    Returns:
        Names of the file that a backbone has no place for (classifier, decoder).

    Raises:
        TensorkeepError: A tensor is unknown, missing or of another shape.
    """
    return load_backbone(vit, source, where)


def _compare(vit: nn.Module, kind: ModuleType, view: StateView, where: str) -> None:
    """Refuse weights whose own config states another shape than the recipe's: no tensor's shape shows the heads."""
    config, names = view.config or {}, getattr(kind, "STATED", {})
    known = config.get("model_type") == getattr(vit, "kind", None)
    said = {ours: config[theirs] for ours, theirs in names.items() if known and theirs in config}
    own = getattr(vit, "config", None)
    said = {n: v[0] if isinstance(v, list) and len(set(map(str, v))) == 1 else v for n, v in said.items()}
    odd = [f"{n} {v}, the recipe {getattr(own, n)}" for n, v in said.items() if getattr(own, n, v) != v]
    if odd:
        raise TensorkeepError(f"its config.json says {'; '.join(odd)}", where=where, hint="set model.backbone.vit so")


def _under_lora(name: str, own: Mapping[str, Tensor]) -> str:
    """Return the name that a weight has in the backbone: under LoRA a linear's own weight lies below `base`."""
    path, _, last = name.rpartition(".")
    wrapped = f"{path}.base.{last}"
    return wrapped if name not in own and wrapped in own else name
