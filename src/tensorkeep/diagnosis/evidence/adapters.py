"""Lay an adapter beside the weights it belongs to, and measure whether they already hold its update.

A weight W of a base and the update s·B·A of an adapter are independent of each other, as far as large matrices can
be; so the coefficient c = <W, s·B·A> / |s·B·A|^2 of the update in W is near 0 before a merge, near 1 after it and near
2 after a second one. Its own noise is |W| / (sqrt(N·K) · |s·B·A|), which says when nothing can be said. A trained
update may lean on its weight a little; so every module must agree before anything is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tensorkeep.adapters.planning import open_adapters, plan_merge
from tensorkeep.adapters.reading import Adapter, read_adapter
from tensorkeep.adapters.shares import Share
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.models.names import names_for
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.codes import Array


def checkpoint_adapter(case: Case) -> Adapter | None:
    """Return the adapter of the checkpoint, read once; None where it holds none."""
    return _read_once(case, "adapter", case.view)


def _reference_adapter(case: Case) -> Adapter | None:
    """Return the adapter of the reference, read once; None where it holds none."""
    return _read_once(case, "reference adapter", case.reference)


def _read_once(case: Case, key: str, view: StateView | None) -> Adapter | None:
    """Read an adapter and keep it under `key`."""
    if key not in case.results:
        case.results[key] = read_adapter(view) if view is not None else None
    found: Adapter | None = case.results[key]
    return found


# -- the weights under it ---------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The model on one side of a case, by Hugging Face name; a quantized weight counts as the matrix it stands for."""

    case: Case
    reference: bool
    hubs: Mapping[str, HfTensor]
    quantized: dict[str, quantized.QuantizedWeight]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a weight, unpacked: () where its quantization does not say, None where there is none."""
        if name in self.quantized:
            return self.quantized[name].shape or ()
        return self.hubs[name].shape if name in self.hubs else None

    def values(self, name: str) -> Array:
        """Return a weight as float32, dequantized where it is quantized."""
        weight = self.quantized.get(name)
        if weight is not None:
            view = self.case.reference if self.reference else self.case.view
            assert view is not None
            return quantized.dequantize(view, weight.name, weight)
        made = self.case.reference_values(name) if self.reference else self.case.values(name)
        return np.asarray(made.astype(np.float32))


def base_of(case: Case, reference: bool) -> Base | None:
    """Return the model on one side of a case, without adapter tensors; None where that side holds no model."""
    view = case.reference if reference else case.view
    hubs = {n: h for n, h in (case.reference_tensors if reference else case.tensors).items() if ".lora" not in n}
    if view is None or view.format == "peft" or not hubs:
        return None
    owners = {part.name: name for name, hub in hubs.items() for part in hub.parts}
    weights = quantized.find_quantized(view).values()
    found = {quantized.float_name(owners.get(w.name, w.name)): w for w in weights}
    return Base(case, reference, hubs, found)


def adapter_and_base(case: Case) -> tuple[Adapter, Base, bool] | None:
    """Find the adapter of a case and the model that it may belong to, whichever side each is on.

    Returns:
        The adapter, the model, and whether the model is the reference; None where a case has not got both.
    """
    mine, theirs = checkpoint_adapter(case), _reference_adapter(case)
    if mine is not None and not theirs and (base := base_of(case, True)):
        return mine, base, True
    if mine is not None and (base := base_of(case, False)):
        return mine, base, False
    if theirs is not None and (base := base_of(case, False)):
        return theirs, base, False
    return None


def would_merge(base: StateView, adapter: Adapter) -> bool:
    """Whether a merge would find a place in a base for all that an adapter holds.

    Args:
        base: the opened base.
        adapter: the adapter.
    """
    try:
        plan_merge(base, open_adapters([(adapter.view, 1.0)]), ask=names_for)
    except TensorkeepError as error:
        return error.code == "T01"  # it fits, and how a tie goes on is for the merge to ask
    return True


# -- how much of an update a weight holds ----------------------------------------------------------------------------


def share(adapter: Adapter, module: str, weight: Array) -> Share | None:
    """Measure how much of an adapter's update a weight already holds.

    Args:
        adapter: The adapter.
        module: The name of a module with a low-rank pair.
        weight: The module's weight, float32, [out, in] (or [in, out] where the adapter says so).

    Returns:
        The coefficient of the update in the weight and its noise; None where shapes do not fit, there is no scale, or
        a variant such as DoRA changes the weight in another way.
    """
    a, b = (adapter.view.array(n).astype(np.float32) for n in adapter.pairs[module])
    scale = adapter.scale(module)
    if (
        scale is None
        or a.ndim != 2
        or b.ndim != 2
        or weight.ndim != 2
        or a.shape[0] != b.shape[1]
        or module in adapter.magnitudes
        or module in adapter.turned
    ):
        return None
    if adapter.document.get("fan_in_fan_out") and weight.shape == (a.shape[1], b.shape[0]):
        weight = weight.T
    if weight.shape != (b.shape[0], a.shape[1]):
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # V01 says what is not finite
        dot = scale * float(np.sum((weight @ a.T) * b, dtype=np.float64))
        square = scale**2 * float(np.sum((b.T @ b) * (a @ a.T), dtype=np.float64))
    norm = float(np.sqrt(np.sum(np.square(weight, dtype=np.float64))))
    if not 0 < square < math.inf or norm == 0:
        return None
    return Share(module, dot / square, norm / math.sqrt(weight.size * square), math.sqrt(square) / norm)
