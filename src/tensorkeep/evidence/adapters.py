"""Adapters beside the weights they belong to: pairs, scales, and whether a weight already holds an update.

A weight W of a base and the update s·B·A of an adapter are independent of each other, as far as large matrices can
be; so the coefficient c = <W, s·B·A> / |s·B·A|^2 of the update in W is near 0 before a merge, near 1 after it and near
2 after a second one. Its own noise is |W| / (sqrt(N·K) · |s·B·A|), which says when nothing can be said. A trained
update may lean on its weight a little; so every module must agree before anything is claimed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorkeep import naming as namings
from tensorkeep import quantized
from tensorkeep.adapters import halves
from tensorkeep.errors import TensorkeepError
from tensorkeep.evidence.case import Case
from tensorkeep.naming import hf, minimind
from tensorkeep.naming.table import from_own
from tensorkeep.plan import Hub
from tensorkeep.quant_codes import Array
from tensorkeep.view import StateView

EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(\.default)?\Z")
MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?\Z")
LONE = re.compile(r"(?P<module>.+)\.lora[._](?P<half>[AB])(\.default)?\.weight\Z")
SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save)?(\.default)?\.(?P<last>weight|bias)\Z")


@dataclass
class Adapter:
    """An adapter read off a view: stored names by module (hf names, without PEFT's prefix)."""

    view: StateView
    document: dict[str, Any]
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # module -> stored names of A and B
    embeddings: dict[str, tuple[str, str]] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)  # DoRA
    saved: dict[str, str] = field(default_factory=dict)  # clean name -> stored name of whole tensors
    lone: list[str] = field(default_factory=list)  # halves without the other
    turned: set[str] = field(default_factory=set)  # modules whose rows follow the other RoPE layout

    @property
    def rslora(self) -> bool:
        return bool(self.document.get("use_rslora"))

    def rank(self, module: str) -> int:
        return self.view[self.pairs[module][0]].shape[0]

    def scale(self, module: str) -> float | None:
        """alpha / r, or alpha / sqrt(r) for rsLoRA; 1 where no config says (MiniMind). None where it says nonsense."""
        alpha: Any = pattern(self.document.get("alpha_pattern"), module) or self.document.get(
            "lora_alpha", None if self.document else self.rank(module)
        )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
            return None
        return float(alpha) / (math.sqrt(self.rank(module)) if self.rslora else self.rank(module))


def pattern(patterns: Any, module: str) -> Any:
    """The entry of PEFT's rank_pattern or alpha_pattern that fits a module: its keys end the module's name."""
    for key, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if not isinstance(key, str) or (module != key and not module.endswith(f".{key}") and not _tame(key)):
            continue
        try:
            if module == key or module.endswith(f".{key}") or re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error:
            continue
    return None


def _tame(regex: str) -> bool:
    """Whether an expression out of an untrusted config cannot keep the matcher busy: few repeats, none of a group."""
    return len(regex) <= 200 and len(re.findall(r"[*+{]", regex)) <= 3 and not re.search(r"\)[*+?{]", regex)


def read_adapter(view: StateView) -> Adapter | None:
    """The adapter in a view (a PEFT folder, or low-rank pairs beside a model), or None."""
    try:
        identity = namings.identify(view)
    except TensorkeepError:
        return None
    found = halves(identity)
    document = view.metadata.get("adapter")
    if not found and view.format != "peft":
        return None
    out = Adapter(view, document if isinstance(document, dict) else {})
    modules: dict[str, dict[str, str]] = {}
    for stored, half in found.items():
        module, turned = _hf_module(half.module)
        modules.setdefault(module, {})[half.half] = stored
        out.turned |= {module} if turned else set()
    out.pairs = {m: (h["A"], h["B"]) for m, h in modules.items()}
    for stored, clean in identity.names.items():
        if stored in found:
            continue
        if match := EMBEDDING.match(clean):
            modules.setdefault(f"embedding {match['module']}", {})[match["half"]] = stored
        elif match := MAGNITUDE.match(clean):
            out.magnitudes[match["module"]] = stored
        elif LONE.match(clean):
            out.lone.append(stored)
        elif view.format == "peft" and (match := SAVED.match(clean)):
            out.saved[f"{match['module']}.{match['last']}"] = stored
    for key, both in modules.items():
        if key.startswith("embedding "):
            if len(both) == 2:
                out.embeddings[key.removeprefix("embedding ")] = (both["A"], both["B"])
            else:
                out.lone += both.values()
    return out


def _hf_module(module: str) -> tuple[str, bool]:
    """The hf name of a module under Meta's names, and whether RoPE's other layout turns its rows."""
    links = None if hf.recognise(f"{module}.weight") else from_own(f"{module}.weight", minimind.META)
    return (links[0].hf.removesuffix(".weight"), links[0].rope) if links else (module, False)


def checkpoint_adapter(case: Case) -> Adapter | None:
    """The adapter of the checkpoint, read once."""
    return _kept(case, "adapter", case.view)


def reference_adapter(case: Case) -> Adapter | None:
    """The adapter that stands as the reference, read once."""
    return _kept(case, "reference adapter", case.reference)


def _kept(case: Case, key: str, view: StateView | None) -> Adapter | None:
    if key not in case.orders:
        case.orders[key] = read_adapter(view) if view is not None else None
    found: Adapter | None = case.orders[key]
    return found


# -- the weights under it ---------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The model side of a case by hf name, quantised weights by what they stand for."""

    case: Case
    reference: bool
    hubs: Mapping[str, Hub]
    quantised: dict[str, quantized.QuantisedWeight]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight, unpacked; () where it is quantised in a way that does not say."""
        if name in self.quantised:
            return self.quantised[name].shape or ()
        return self.hubs[name].shape if name in self.hubs else None

    def values(self, name: str) -> Array:
        """float32 values of a weight, dequantised where it is quantised."""
        weight = self.quantised.get(name)
        if weight is not None:
            view = self.case.reference if self.reference else self.case.view
            assert view is not None
            return quantized.dequantise(view, weight.name, weight)
        made = self.case.reference_values(name) if self.reference else self.case.values(name)
        return np.asarray(made.astype(np.float32))


def base_of(case: Case, reference: bool) -> Base | None:
    """The model on one side of a case, without adapter tensors; None where that side holds no model."""
    view = case.reference if reference else case.view
    hubs = {n: h for n, h in (case.reference_tensors if reference else case.tensors).items() if ".lora" not in n}
    if view is None or view.format == "peft" or not hubs:
        return None
    owners = {part.name: name for name, hub in hubs.items() for part in hub.parts}
    found = {owners.get(w.name, w.name): w for w in quantized.find(view).values()}
    return Base(case, reference, hubs, found)


def sides(case: Case) -> tuple[Adapter, Base, bool] | None:
    """Adapter and model of a case, whichever way round; the last says whether the model is the reference."""
    mine, theirs = checkpoint_adapter(case), reference_adapter(case)
    if mine is not None and not theirs and (base := base_of(case, True)):
        return mine, base, True
    if mine is not None and (base := base_of(case, False)):
        return mine, base, False
    if theirs is not None and (base := base_of(case, False)):
        return theirs, base, False
    return None


# -- how much of an update a weight holds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The coefficient of one module's update in its weight, the noise of that figure, and the update's own size."""

    module: str
    coefficient: float
    noise: float
    relative: float


def share(adapter: Adapter, module: str, weight: Array) -> Share | None:
    """How much of an update a weight already holds; None where shapes, scale or a variant forbid the figure."""
    a, b = (adapter.view.array(n).astype(np.float32) for n in adapter.pairs[module])
    scale = adapter.scale(module)
    if (
        scale is None
        or a.ndim != 2
        or b.ndim != 2
        or weight.ndim != 2
        or module in adapter.magnitudes
        or module in adapter.turned
    ):
        return None
    if adapter.document.get("fan_in_fan_out") and weight.shape == (a.shape[1], b.shape[0]):
        weight = weight.T
    if weight.shape != (b.shape[0], a.shape[1]):
        return None
    dot = scale * float(np.sum((weight @ a.T) * b, dtype=np.float64))
    square = scale**2 * float(np.sum((b.T @ b) * (a @ a.T), dtype=np.float64))
    norm = float(np.sqrt(np.sum(np.square(weight, dtype=np.float64))))
    if square <= 0 or norm == 0:
        return None
    return Share(module, dot / square, norm / math.sqrt(weight.size * square), math.sqrt(square) / norm)


def times_merged(shares: list[Share]) -> tuple[int | None, dict[str, Any]]:
    """0, 1 or 2 times merged, None where it cannot be told, and the figures.

    A module's agreement is told by its noise; pooling over modules weighs them by the size of their update.
    """
    if not shares:
        return None, {}
    weights = np.array([1 / s.noise**2 for s in shares])
    values = np.array([s.coefficient for s in shares])
    pooled, noise = float((values * weights).sum() / weights.sum()), float(1 / np.sqrt(weights.sum()))
    figures = {
        "coefficient": round(pooled, 4), "noise": round(noise, 4), "modules": len(shares),
        "update_relative_to_weight": round(float(np.median([s.relative for s in shares])), 5),
    }  # fmt: skip
    for times in (0, 1, 2):
        agree = np.mean([abs(s.coefficient - times) < 0.15 + 4 * s.noise for s in shares])
        if noise < 0.1 and abs(pooled - times) < 0.1 + 3 * noise and agree >= 0.9:
            return times, figures
    return None, figures
