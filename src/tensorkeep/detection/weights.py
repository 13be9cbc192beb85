"""Foreign weights into a detector or its backbone, strictly: nothing missing, unexpected or misshapen stays unnamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.naming import opentad, videomae


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str, absent: Iterable[str] = ()) -> None:
    """Copy `tensors`, by our names, into `module`; every tensor of both sides must meet, except the names in `absent`.

    Raises TensorkeepError that names what is missing, unexpected or of another shape; then nothing was changed.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys() - set(absent))
    extra = sorted(tensors.keys() - own.keys())
    shapes = [f"{n} {tuple(t.shape)} instead of {tuple(own[n].shape)}" for n, t in tensors.items()
              if n in own and own[n].shape != t.shape]  # fmt: skip
    problems = [("missing", missing), ("unexpected", extra), ("shape differs", shapes)]
    if any(names for _, names in problems):
        what = "; ".join(f"{label}: {', '.join(names[:5])} ({len(names)})" for label, names in problems if names)
        raise TensorkeepError(what, where=where, hint="does the recipe describe this checkpoint?")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def load_opentad(detector: nn.Module, tensors: Mapping[str, Tensor], where: str = "OpenTAD checkpoint") -> None:
    """A `state_dict` (or `state_dict_ema`) of OpenTAD, with or without `module.`, into a detector of the same recipe."""
    load_exactly(detector, _renamed(tensors, lambda n: opentad.to_hf(opentad.strip_wrapper(n)), where), where)


def to_opentad(detector: nn.Module) -> dict[str, Tensor]:
    """The detector's tensors under OpenTAD's names, sharing storage; OpenTAD loads them strictly.

    Raises TensorkeepError for a tensor that OpenTAD has no name for.
    """
    return _renamed(detector.state_dict(), opentad.from_hf, "detector")


def load_videomae(vit: nn.Module, tensors: Mapping[str, Tensor], where: str = "VideoMAE checkpoint") -> list[str]:
    """Pretrained weights under VideoMAE's, VideoMAEv2's, mmaction's or transformers' names into a backbone.

    Adapters and LoRA weights are new and keep their values; so does the fixed position table, and `fc_norm` where
    the file has none. Returns the names of the file that a backbone has no place for (classifier, decoder).
    """
    names = {n.removeprefix("module.").removeprefix("model."): t for n, t in tensors.items()}
    renamed: dict[str, Tensor] = {}
    left: list[str] = []
    if any(name.startswith(("videomae.", "encoder.layer.")) for name in names):
        renamed, left = _from_transformers(names, where)
    else:
        rename = opentad.from_mmaction if any(n.startswith("backbone.") for n in names) else videomae.to_hf
        for name, tensor in names.items():
            ours = rename(name)
            if ours is None and videomae.dropped(name) is None and name.split(".")[0] not in opentad.DROPPED:
                raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint="is this a VideoMAE encoder?")
            left += [name] if ours is None else []
            renamed |= {} if ours is None else {ours: tensor}
    bare = {name.removeprefix("backbone."): tensor for name, tensor in renamed.items()}
    new = [n for n in vit.state_dict() if "adapter" in n.split(".") or n.split(".")[-1] in ("lora_A", "lora_B")]
    # a linear under LoRA keeps its pretrained weight one level down
    own = vit.state_dict()
    bare = {_under_lora(name, own): tensor for name, tensor in bare.items()}
    load_exactly(vit, bare, where, absent=[*new, "pos_embed", "fc_norm.weight", "fc_norm.bias"])
    return left


def _under_lora(name: str, own: Mapping[str, Tensor]) -> str:
    path, _, last = name.rpartition(".")
    wrapped = f"{path}.base.{last}"
    return wrapped if name not in own and wrapped in own else name


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str | None], where: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new is None:
            raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint="is this an ActionFormer detector?")
        renamed[new] = tensor
    return renamed


def _from_transformers(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    left = []
    for name, tensor in tensors.items():
        found = videomae.from_transformers(name)
        if found is None:
            left.append(name)
        elif found[1] is None:
            renamed[found[0]] = tensor
        else:
            thirds.setdefault(found[0], {})[found[1]] = tensor
    for name, parts in thirds.items():
        if len(parts) != 3:
            raise TensorkeepError(f"{name} lacks its query, key or value", where=where)
        renamed[name] = torch.cat([parts[i] for i in range(3)])
    return renamed, left
