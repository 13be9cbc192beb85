"""Chapter `diagnose`: break SmolLM2 in five ways, name each fault, repair it, and see its loss back where it was.

Every fault is a plan with a mistake in it, as a converter's author would make it; layers are drawn from SEED. Nothing
crashes on four of the five: they load, run, and are wrong.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tensorkeep.commands.demo.story import Show, load_hf, loss, smollm2, token_ids
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.naming import layer_count
from tensorkeep.conversion.naming.hf import EMBEDDING
from tensorkeep.conversion.plan import Plan, RowPermutation, Step
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.repairs import repair
from tensorkeep.formats.view import read

if TYPE_CHECKING:
    import torch

SEED = 0
Fault = Callable[[Plan, random.Random], Plan]


def chapter_diagnose(out: Path, show: Show) -> int:
    """Break, name, repair, measure, five times; return 0 if each cause was named and each loss came back."""
    started = time.perf_counter()
    good = out / "good"
    convert(make_plan([read(smollm2())], "hf"), str(good), "hf", overwrite=True)
    ids = token_ids(good)
    reference = loss(load_hf(good), ids)
    show(f"The model as it should be: loss {reference:.6f}. Now five mistakes, seed {SEED}:")
    held = [_one(n, good, out, reference, ids, show) for n in range(len(FAULTS))]
    show(f"{sum(held)} of {len(FAULTS)} named and repaired; {time.perf_counter() - started:.0f} s.")
    show(f"Try next:\n  tensorkeep diagnose {out / 'broken-1'} --reference {good}\n  tensorkeep explain O02")
    return 0 if all(held) else 1


def _one(number: int, good: Path, out: Path, reference: float, ids: torch.Tensor, show: Show) -> bool:
    """Play one fault; return whether its cause was named and its loss came back."""
    what, code, to, fault = FAULTS[number]
    broken, mended = out / f"broken-{number + 1}", out / f"mended-{number + 1}"
    root = "model" if code == "K04" else None
    plan = fault(make_plan([read(good)], to, root=root), random.Random(SEED + number))
    convert(plan, str(broken), to, overwrite=True)
    wrong = "none: dcp.load finds no lm_head.weight"
    if to == "hf":
        wrong = f"{loss(load_hf(broken), ids):.4f}"
    show(f"{number + 1}/5  {what}: loss {wrong}")
    found = diagnose(str(broken), str(good))
    message = next((f.message for f in found.findings if f.code in found.causes), "nothing found")
    show(f"     {', '.join(found.causes) or 'no cause'}: {message}")
    repair(str(broken), str(mended), str(good), overwrite=True)
    folder = mended
    if to != "hf":
        folder = out / f"mended-{number + 1}-hf"
        convert(make_plan([read(mended)], "hf"), str(folder), "hf", overwrite=True)
    back = loss(load_hf(folder), ids)
    show(f"     repaired: loss {back:.6f}{'' if back == reference else ', NOT the reference'}")
    return found.causes == [code] and back == reference


# -- five mistakes ----------------------------------------------------------------------------------------------------


def turned(plan: Plan, _: random.Random) -> Plan:
    """Leave q and k in the interleaved RoPE layout."""
    head = (plan.config or {})["head_dim"]

    def turn(step: Step) -> Step:
        if step.sink is None or not step.sink.name.endswith(("q_proj.weight", "k_proj.weight")):
            return step
        return replace(step, parts=tuple(p.permuted(RowPermutation(head, head, "pairs")) for p in step.parts))

    return replace(plan, steps=[turn(s) for s in plan.steps])


def _swapped_layers(plan: Plan, draw: random.Random) -> Plan:
    """Put two layers under each other's number."""
    first, second = (f"model.layers.{n}." for n in draw.sample(range(_layers(plan)), 2))

    def other(name: str) -> str:
        for here, there in ((first, second), (second, first)):
            if name.startswith(here):
                return there + name[len(here) :]
        return name

    return _from(plan, other)


def swapped_gate_up(plan: Plan, draw: random.Random) -> Plan:
    """Exchange gate_proj and up_proj in one layer."""
    layer = f"model.layers.{draw.randrange(_layers(plan))}.mlp."
    pair = (f"{layer}gate_proj.weight", f"{layer}up_proj.weight")
    return _from(plan, lambda name: pair[1 - pair.index(name)] if name in pair else name)


def _shifted_vocabulary(plan: Plan, _: random.Random) -> Plan:
    """Move every row of the embedding one id too early."""

    def shift(step: Step) -> Step:
        if step.sink is None or step.sink.name != EMBEDDING:
            return step
        (part,) = step.parts
        last = step.sink.shape[0]
        return replace(step, parts=(part._replace(rows=(1, last)), part._replace(rows=(0, 1))))

    return replace(plan, steps=[shift(s) for s in plan.steps])


def unchanged(plan: Plan, _: random.Random) -> Plan:
    """Return the plan as it is: its tensors are right, only the root they are written under is not."""
    return plan


def _layers(plan: Plan) -> int:
    """Count the layers that a plan writes."""
    return layer_count(t.name for t in plan.tensors)


def _from(plan: Plan, source: Callable[[str], str]) -> Plan:
    """Return the plan with each tensor taken from the one that `source` names."""
    parts = {s.sink.name: s.parts for s in plan.steps if s.sink is not None}
    return replace(
        plan, steps=[s if s.sink is None else replace(s, parts=parts[source(s.sink.name)]) for s in plan.steps]
    )


FAULTS: tuple[tuple[str, str, str, Fault], ...] = (
    ("q and k left in the other RoPE layout", "O01", "hf", turned),
    ("two layers exchanged", "O02", "hf", _swapped_layers),
    ("gate and up exchanged in one layer", "O03", "hf", swapped_gate_up),
    ("the vocabulary shifted by one", "O04", "hf", _shifted_vocabulary),
    ("a DCP nested under 'model' where flat names are asked for", "K04", "dcp", unchanged),
)
