"""F08 another step would be loaded: the folder's loader takes the highest `step-N`, not the one meant.

What it is: torchtitan and flame load the highest `step-N` of a folder that has `.metadata` (or an index), and ignore
`initial_load_path` as soon as the folder holds any step.
How it happens: a first failed run saved step-1; the new, correct step-0 is then never read again.
How it shows: every conversion is right and the loss is still that of the failed run.
What to do: move the higher steps away, or set load_step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding, Severity

CODE = "F08"
# torchtitan searches, it does not match: `old-step-9` counts too (facts §1.2)
STEP = re.compile(r"step-(\d+)")
_COMPLETE = (".metadata", "model.safetensors.index.json")


def check(case: Case) -> Iterator[Finding]:
    """Higher steps beside this one: an error for the loaders that would take them, a warning beside a step-0.

    A step-0 is what a conversion makes; a step in the middle of a run is looked at on purpose.
    """
    path = Path(case.path)
    if "://" in case.path or not path.is_dir():
        return
    own = STEP.search(path.resolve().name)
    if own is None:
        return
    others = {int(m[1]): p.name for p in path.resolve().parent.iterdir() if (m := STEP.search(p.name)) and _complete(p)}
    higher = max(others, default=-1)
    if higher <= int(own[1]):
        return
    meant = case.target in ("flame", "torchtitan")
    severity: Severity = "error" if meant else "warning" if own[1] == "0" else "info"
    yield Finding(
        CODE,
        severity,
        f"flame and torchtitan would load {others[higher]}, not {path.resolve().name}: they take the highest step",
        (),
        {"meant": int(own[1]), "loaded": higher, "steps": sorted(others)},
        fix=f"mv {path.resolve().parent / others[higher]} {path.resolve().parent.parent}/  # or --checkpoint.load_step {own[1]}",
    )


def _complete(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in _COMPLETE)
