"""R04 recipe changed: the run's settings are not those the checkpoint was written with.

What it means
    The settings stored in a checkpoint (its recipe, the groups of its optimizer) differ from the run's `recipe.yaml`,
    or from those of the reference checkpoint.

How it shows
    The resumed run is no continuation: another schedule (more epochs raised the learning rate 5.5 times in one case),
    other betas over old moments, other data under an old position.

What to do
    Resume with the recipe that is stored, or say that the change is meant. Checkpoints of other programs store little
    of their settings; only what they store is compared. `train` names the data files whose bytes are
    others than at the save, where the checkpoint has their digests: text data that is not streamed, and videos or
    features with their annotations (of a video its size and the first and last 64 KiB), up to 1,000 files. Of the base
    under a language model's adapter it names the files with other tensors, and another config (`base.config`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import reference_state, resume_state
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.yaml_documents import read_yaml
from tensorkeep.training.migration import migrated

CODE = "R04"
# of optimizer groups: these change in every run, and a label is a name
_MOVING = ("lr", "initial_lr", "params", "step", "label")
_MOST_SETTINGS = 10_000


def check(case: Case) -> Iterator[Finding]:
    """Warn of settings that differ, and list them."""
    state, other = resume_state(case), reference_state(case)
    if state is None or case.view is None:
        return
    mine = state.document.get("recipe")
    theirs = other.document.get("recipe") if other is not None else _recipe_beside(case.view)
    where = "the reference's" if other is not None else "recipe.yaml"
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        yield from _said(_differing(mine, theirs), where)
    if other is not None and case.reference is not None:
        yield from _said(_different(_groups(case.view), _groups(case.reference)), "the reference's optimizer groups")


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two recipes say differently. Of two versions both are read as today's, and what one did not know is left."""
    if mine.get("version") == theirs.get("version"):
        return _different(_flat(mine), _flat(theirs))
    try:
        one, other = (_flat(migrated(recipe)[0]) for recipe in (mine, theirs))
    except TensorkeepError:  # a version from after this one, or no recipe of ours
        return {"version": (mine.get("version"), theirs.get("version"))}
    both = one.keys() & other.keys()
    return _different({k: one[k] for k in both}, {k: other[k] for k in both})


def _said(changed: dict[str, tuple[Any, Any]], where: str) -> Iterator[Finding]:
    """Make the warning about settings that differ, (checkpoint's, other's) by name."""
    if changed:
        first = ", ".join(f"{k} {shown(a)} / {shown(b)}" for k, (a, b) in list(changed.items())[:4])
        evidence = {k: [shown(a), shown(b)] for k, (a, b) in list(changed.items())[:64]}
        yield Finding(CODE, "warning", f"{len(changed)} settings are not {where}: {first}", (), evidence)


def _recipe_beside(view: StateView) -> Any:
    """Read the run's recipe.yaml, two folders above a step; None where there is none to read."""
    if not isinstance(view.folder, LocalFolder):
        return None
    path = Path(view.folder.path).resolve().parent.parent / "recipe.yaml"
    try:
        return read_yaml(path) if path.is_file() else None
    except (OSError, TensorkeepError):
        return None


def _flat(document: Mapping[Any, Any]) -> dict[str, Any]:
    """Return settings by dotted name, at most _MOST_SETTINGS: a few aliases in YAML can stand for endless ones."""
    out: dict[str, Any] = {}
    left: list[tuple[str, Any]] = [("", document)]
    while left and len(out) < _MOST_SETTINGS:
        name, value = left.pop()
        if isinstance(value, Mapping) and len(left) < _MOST_SETTINGS:
            left += [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
        else:
            out[name] = value
    return out


def _groups(view: StateView) -> dict[str, Any]:
    """Return the plain settings of optimizer groups; those in DCP are opaque and left out."""
    out: dict[str, Any] = {}
    for name, value in view.entries.items():
        if (
            ".param_groups." in name
            and name.rpartition(".")[2] not in _MOVING
            and isinstance(value, (int, float, bool, str))
        ):
            out[name] = value
        elif (
            ".param_groups." in name
            and name.endswith(".betas")
            and isinstance(value, (tuple, list))
            and view.format != "dcp"
        ):
            out[name] = list(value)
    return out


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ; {} where either side has none."""
    if not a or not b:
        return {}
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}
