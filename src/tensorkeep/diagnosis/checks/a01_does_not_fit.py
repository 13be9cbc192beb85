"""A01 adapter does not fit the base: modules that the base lacks, or of another shape.

What it means
    Every low-rank pair of an adapter (A: rank x in, B: out x rank) names a module, and the base must have a weight
    [out, in] there. The same holds for the magnitudes of DoRA (one for each output) and for whole modules that were
    saved beside the pairs.

How it happens
    The base is another model of the same family (other width, fewer layers, fewer key/value heads), or has other
    names (`model.` or `module.` in front, fused or split projections); or the adapter of a model with experts meets a
    dense one.

How it shows
    PEFT raises for shapes. For names it only warns: pairs without a module are dropped, and modules without a pair
    keep a fresh one that does nothing, so that half an adapter loads with one UserWarning. MiniMind's loader says
    nothing.

What to do
    Load it on the base that it was trained on. `tensorkeep diff` shows how two bases differ in names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.adapters.reading import Adapter
from tensorkeep.diagnosis.evidence.adapters import Base, adapter_and_base, checkpoint_adapter, would_merge
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import near_misses
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped

CODE = "A01"


def check(case: Case) -> Iterator[Finding]:
    """Report pairs without a module in the base, and shapes that differ; an info where there is no base to compare."""
    found = adapter_and_base(case)
    if found is None:
        if checkpoint_adapter(case) is not None:
            message = "an adapter alone: whether it fits a base was not looked at; give the base with --reference"
            yield Finding(CODE, "info", message)
        return
    adapter, base, model_is_reference = found
    missing, shapes = _compare(adapter, base)
    view = case.reference if model_is_reference else case.view
    if (missing or shapes) and view is not None and would_merge(view, adapter):
        names = [*missing, *shapes]
        message = (
            f"{len(names)} tensors have another name or number of rows in the base's file than in the adapter, and a "
            f"merge finds them all the same: {', '.join(grouped(names)[:3])}"
        )
        yield Finding(CODE, "info", message, names)
        return
    if missing:
        hint = near_misses(missing[0], base.hubs)
        total = len(adapter.pairs) + len(adapter.embeddings) + len(adapter.saved) + len(adapter.parts)
        message = (
            f"{len(missing)} of the adapter's {total} modules are not in the base: {', '.join(grouped(missing)[:4])}"
            + (f"; {hint}" if hint else "")
        )
        yield Finding(CODE, "error", message, missing, {"missing": len(missing), "modules": total})
    if shapes:
        name, (wanted, there) = next(iter(shapes.items()))
        message = (
            f"{len(shapes)} modules have another shape in the base: {name} is {list(there)} there, the adapter was "
            f"made for {list(wanted)}"
        )
        evidence = {n: {"adapter": list(w), "base": list(t)} for n, (w, t) in list(shapes.items())[:32]}
        yield Finding(CODE, "error", message, list(shapes), evidence)


_Wanted = tuple[int | None, ...]  # None: any number


def _same(wanted: _Wanted, there: tuple[int, ...]) -> bool:
    """Whether a weight has the shape that an adapter was made for."""
    return all(w is None or w == t for w, t in zip(wanted, there))


def _compare(adapter: Adapter, base: Base) -> tuple[list[str], dict[str, tuple[_Wanted, tuple[int, ...]]]]:
    """Return the weights that the base lacks, and those of another shape with (the adapter's, the base's)."""
    missing: list[str] = []
    shapes: dict[str, tuple[_Wanted, tuple[int, ...]]] = {}
    for name, wanted in _wanted(adapter).items():
        there = base.shape(name)
        if there is None:
            missing.append(name)
        elif (
            there
            and len(there) == len(wanted)
            and not _same(wanted, there)
            and not (adapter.document.get("fan_in_fan_out") and _same(wanted[::-1], there))
        ):
            shapes[name] = wanted, there  # of another number of dimensions: experts in one tensor, which pairs may span
    return missing, shapes


def _wanted(adapter: Adapter) -> dict[str, _Wanted]:
    """Return the shape that each weight of the base must have, by name."""
    out: dict[str, _Wanted] = {}
    for module, (a, b) in adapter.pairs.items():
        first, second = adapter.view[a].shape, adapter.view[b].shape
        if len(first) >= 2 and len(second) >= 2:
            out[f"{module}.weight"] = (second[0], *first[1:])
    for module, (a, b) in adapter.embeddings.items():
        first, second = adapter.view[a].shape, adapter.view[b].shape
        if len(first) == 2 and len(second) == 2:
            out[f"{module}.weight"] = (first[1], second[0])
    for name, (word, module) in adapter.plug.changes(adapter).items():
        if module in adapter.parts and word not in getattr(adapter.plug, "MAY_LACK", ()):  # of a kind other than LoRA
            out[name] = adapter.plug.shapes(adapter, word, module)[-1][0]
    for name, stored in adapter.saved.items():
        out[name] = adapter.view[stored].shape
    return out
