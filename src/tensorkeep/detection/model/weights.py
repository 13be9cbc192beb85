"""Weights into a detector or its backbone, strictly: nothing missing, unexpected or misshapen stays unnamed.

Files go through the same namings as `tensorkeep convert`, so any format and naming of a detector loads directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from tensorkeep.conversion.naming import identify, opentad, videomae
from tensorkeep.conversion.naming.opentad_recipe import FILE
from tensorkeep.conversion.plan import Plan
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.detection.model.detector import Detector, DetectorConfig, read_detector_config
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage.record import DTYPES
from tensorkeep.training.schema import from_mapping


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], where: str, absent: Iterable[str] = ()) -> None:
    """Copy `tensors`, by our names, into `module`; every tensor of both sides must meet, except the names in `absent`.

    Raises TensorkeepError that names what is missing, unexpected or of another shape; then nothing was changed.
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


def load_detector(path: str | Path, recipe: str | Path | None = None, average: bool = False) -> Detector:
    """The detector of a checkpoint of any format and naming, OpenTAD's included, on the CPU and in evaluation mode.

    Without `recipe` it is built after the `recipe.yaml` beside the weights, or what their shapes say. `average` takes
    the EMA of an OpenTAD checkpoint, which is what OpenTAD evaluates. Raises TensorkeepError for whatever does not fit.

    >>> detector = load_detector("epoch_59.pth", "adatad_thumos_videomae_s.yaml", average=True)  # doctest: +SKIP
    """
    plan = make_plan([read(path)], "hf", drop=["state_dict.*"] if average else [])
    config = read_detector_config(recipe) if recipe is not None else _own_config(plan, str(path))
    detector = Detector(config)
    load_exactly(detector, _tensors(plan), str(path))
    return detector.eval()


def _own_config(plan: Plan, where: str) -> DetectorConfig:
    found = next((c for c in plan.companions if c.name == FILE), None)
    if found is None:
        raise TensorkeepError(
            "no recipe.yaml lies beside the weights", where=where, hint="give the recipe they were trained with"
        )
    try:
        document = yaml.safe_load(found.data)
    except yaml.YAMLError as error:
        raise TensorkeepError(f"cannot be read as a recipe: {error}", where=found.where) from error
    section = document.get("model") if isinstance(document, Mapping) else None
    return from_mapping(DetectorConfig, {} if section is None else section, f"{found.where}: model")


def _tensors(plan: Plan) -> dict[str, Tensor]:
    """Every tensor that the plan makes, in memory."""
    made: dict[str, Tensor] = {}
    for step in plan.steps:
        if step.sink is None:
            continue
        dtype = getattr(torch, str(DTYPES[step.sink.dtype].torch), None)
        if dtype is None:
            raise TensorkeepError(f"torch has no dtype for {step.sink.dtype}", where=step.sink.name)
        data = bytearray()
        write_tensor(step, plan.sources, data.extend)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        made[step.sink.name] = flat.reshape(step.sink.shape)
    return made


def load_opentad(detector: nn.Module, tensors: Mapping[str, Tensor], where: str = "OpenTAD checkpoint") -> None:
    """A `state_dict` (or `state_dict_ema`) of OpenTAD, with or without `module.`, into a detector of the same recipe."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = opentad.to_hf(opentad.strip_wrapper(name))
        if ours is None:
            raise TensorkeepError(f"unknown tensor {name!r}", where=where, hint="is this an ActionFormer detector?")
        renamed[ours] = tensor
    load_exactly(detector, renamed, where)


def to_opentad(detector: nn.Module) -> dict[str, Tensor]:
    """The detector's tensors under OpenTAD's names, sharing storage; OpenTAD loads them strictly.

    Raises TensorkeepError for a tensor that OpenTAD has no name for.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in detector.state_dict().items():
        theirs = opentad.from_hf(name)
        if theirs is None:
            raise TensorkeepError(
                f"OpenTAD has no tensor for {name!r}", where="detector", hint="merge LoRA into the weights first"
            )
        renamed[theirs] = tensor
    return renamed


def load_videomae(
    vit: nn.Module, source: str | Path | Mapping[str, Tensor], where: str = "VideoMAE checkpoint"
) -> list[str]:
    """Pretrained weights under VideoMAE's, VideoMAEv2's, mmaction's or transformers' names into a backbone.

    `source`: a file or folder, or tensors by name. Adapters and LoRA weights are new and keep their values; so does
    the fixed position table, and `fc_norm` where the file has none. Returns the names of the file that a backbone
    has no place for (classifier, decoder).
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
    """A linear under LoRA keeps its pretrained weight one level down."""
    path, _, last = name.rpartition(".")
    wrapped = f"{path}.base.{last}"
    return wrapped if name not in own and wrapped in own else name
