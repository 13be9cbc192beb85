"""F08 another step would be loaded: the loader takes the highest `step-N` of the folder, not the one meant.

What it means
    torchtitan and flame load the highest `step-N` beside this one that has a `.metadata` (or an index). As soon as
    there is any step, they ignore `initial_load_path`.

How it happens
    A first, failed run saved step-1. The correct step-0 that was converted afterwards is then never read.

How it shows
    Every conversion is right, and the loss is still that of the failed run.

What to do
    Move the higher steps away, or set `load_step`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding, Severity

CODE = "F08"
NEEDS = "your decision which step is meant: move the others away"
# torchtitan looks for the pattern anywhere in the name: `old-step-9` counts too
STEP = re.compile(r"step-(\d+)")
_COMPLETE = (".metadata", "model.safetensors.index.json")


def check(case: Case) -> Iterator[Finding]:
    """Report higher steps beside this one: an error for the loaders that would take them, a warning beside a step-0.

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
    message = f"flame and torchtitan would load {others[higher]}, not {path.resolve().name}: they take the highest step"
    evidence = {"meant": int(own[1]), "loaded": higher, "steps": sorted(others)}
    fix = (
        f"mv {path.resolve().parent / others[higher]} {path.resolve().parent.parent}/  # or --checkpoint.load_step "
        f"{own[1]}"
    )
    yield Finding(CODE, severity, message, (), evidence, fix=fix)


def _complete(path: Path) -> bool:
    """Say whether the loaders would take a folder for a step."""
    return path.is_dir() and any((path / name).exists() for name in _COMPLETE)
