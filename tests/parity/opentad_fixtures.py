"""Reading the model side's fixtures: which kind a file is, and its numbers as tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Case = tuple[str, float, float]


@dataclass(frozen=True)
class Fixture:
    name: str
    kind: str
    tensors: dict[str, Tensor]
    meta: Any

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


def read_fixtures(folder: Path) -> Iterator[Fixture]:
    """The model fixtures of a folder, told apart by what is in them, not by what they are called."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            kind = _kind(names)
            if kind is None:
                continue
            tensors = {name: file.get_tensor(name) for name in names}
            inside = (file.metadata() or {}).get("meta")
        beside = path.with_suffix(".json")
        text = beside.read_text() if beside.exists() else inside
        yield Fixture(path.stem, kind, tensors, json.loads(text) if text else {})
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text())
        if isinstance(meta, dict) and "lr_used_at_iteration" in meta:
            yield Fixture(path.stem, "schedule", {}, meta)
        elif isinstance(meta, dict) and isinstance(meta.get("state_dict"), list):
            yield Fixture(path.stem, "keys", {}, meta)


def _kind(names: list[str]) -> str | None:
    marks = (
        ("detector", lambda n: n == "in/features"),
        ("backbone", lambda n: n == "in/frames_uint8"),
        ("train_engine", lambda n: n == "in/0.frames_uint8"),
        ("label_assignment", lambda n: "/cls_targets." in n),
        ("losses", lambda n: n == "focal/logits"),
        ("videomae", lambda n: n.startswith("original/")),
        ("ema", lambda n: n == "step0/ema_w"),
        ("pos_embed", lambda n: n.startswith(("vit/", "actionformer/"))),
    )
    return next((kind for kind, mark in marks if any(map(mark, names))), None)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    return float((ours.detach().double() - theirs.double()).abs().max())


def relative(ours: float | Tensor, theirs: float | Tensor) -> float:
    """Relative difference of two numbers."""
    ours, theirs = (float(x.detach()) if isinstance(x, Tensor) else x for x in (ours, theirs))
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def unequal(ours: Tensor, theirs: Tensor) -> float:
    """How many elements differ."""
    return float((ours != theirs).sum()) if ours.shape == theirs.shape else float("inf")


class Capture:
    """Collects what submodules return: `capture[path]` is a list, one entry a call."""

    def __init__(self, module: torch.nn.Module, paths: list[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        self._handles = []
        for path in paths:
            hook = self._hook(path)
            self._handles.append(module.get_submodule(path).register_forward_hook(hook))

    def _hook(self, path: str) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.outputs.setdefault(path, []).append(first.detach())

        return keep

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
