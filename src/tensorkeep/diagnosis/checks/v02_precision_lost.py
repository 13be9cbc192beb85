"""V02 precision lost: the values went through fp16, bf16, fp8 or a quantized form and back.

What it is: every value lies on the grid of a narrower type than the one it is stored in.
How it happens: a tool "saves memory" on the way, a quantized model was dequantized and saved as the original, a cast
dropped fp8's scales.
How it shows: bf16 and fp16 +0.00 of loss, e4m3 +0.06, e5m2 +0.32 (measured); training on it starts from a worse
place, and nothing in names, shapes or dtypes says so.
What to do: convert again from the original. The lost bits are not here.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.checks.s04_dtype_differs import lossy
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.casts import Passage, on_grid, passage
from tensorkeep.diagnosis.evidence.scan import scan
from tensorkeep.findings import Finding
from tensorkeep.storage.record import DTYPES

CODE = "V02"


def check(case: Case) -> Iterator[Finding]:
    """The grid that each tensor went through, and how many values overflowed or vanished on it."""
    if case.reference is None:
        yield from _alone(case)
        return
    found: dict[str, Passage] = {}
    for name in case.differing():
        through = _encoded(case, name) or passage(*case.pair(name))
        if through is not None:
            found[name] = through
    for name in case.shared():
        sight = case.sights.get(name)
        if sight is not None and sight.status == "cast" and name not in case.claims and lossy(case, name):
            found[name] = Passage(
                f"{DTYPES[case.tensors[name].dtype].torch}, and stored so", sight.overflowed, sight.vanished, True
            )
    for grid in dict.fromkeys(p.grid for p in found.values()):
        names = [n for n, p in found.items() if p.grid == grid]
        case.claim(names, CODE)
        overflowed, vanished = sum(found[n].overflowed for n in names), sum(found[n].vanished for n in names)
        known = grid.startswith("GGUF")
        yield Finding(
            CODE,
            "info" if known else "error",
            f"{len(names)} tensors went through {grid}: {overflowed} values overflowed, {vanished} became zero",
            names,
            {"grid": grid, "overflowed": overflowed, "vanished": vanished, "exact": all(found[n].exact for n in names)},
            explains=["V06"],
        )


def _encoded(case: Case, name: str) -> Passage | None:
    """A tensor that its own file stores quantized has lost precision openly."""
    for hubs, view in ((case.tensors, case.views[0]), (case.reference_tensors, case.views[1])):
        encoding = view[hubs[name].parts[0].name].encoding
        if encoding != "plain":
            return Passage(f"GGUF's {encoding}", 0, 0, False)
    return None


def _alone(case: Case) -> Iterator[Finding]:
    grids: dict[str, list[str]] = {}
    for name, seen in scan(case).items():
        if seen.grid is not None and name not in case.claims:
            grids.setdefault(seen.grid, []).append(name)
    for grid, names in grids.items():
        case.claim(names, CODE)
        yield Finding(
            CODE,
            "error",
            f"all values of {len(names)} tensors lie on the grid of {grid}, without scales",
            names,
            {"grid": grid},
        )


__all__ = ["CODE", "check", "on_grid"]
