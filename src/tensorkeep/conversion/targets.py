"""Say which program loads what is planned, by that program's own rules, before anything is written.

"proven: loads in X" is said where every rule of X was applied to the planned tensors and found nothing. Otherwise the
proof says what was not checked and why. What the program would misread is refused. A program is one line of TARGETS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensorkeep.conversion._target_rules import NONE, Proof, Rule, Sink, by_adapter_folder, by_loader, by_state_dict
from tensorkeep.conversion._target_rules import Programs as Programs
from tensorkeep.conversion._target_tables import by_detector, by_minimind, by_olmo_core, by_torchtitan
from tensorkeep.conversion.plan import Plan
from tensorkeep.errors import TensorkeepError, near_misses

_TITAN = ("torchtitan", "torchtitan-0.2")


@dataclass(frozen=True)
class Target:
    """One program that loads checkpoints.

    Args:
        rules: for each format that it loads: what its loader asks of the tensors.
        namings: the namings that it loads from a format; the first is taken where the user names none.
        root: what it asks names to be below.
    """

    rules: Mapping[str, Rule]
    namings: Mapping[str, tuple[str, ...]]
    root: str | None = None


TARGETS: dict[str, Target] = {
    "transformers": Target(
        {"hf": by_loader, "dcp": by_state_dict, "pth": by_state_dict},
        {"hf": ("hf",), "dcp": ("hf",), "pth": ("hf",)},
    ),
    "peft": Target({"peft": by_adapter_folder}, {"peft": ("hf",)}),
    "torchtitan": Target({"dcp": by_torchtitan, "hf": by_torchtitan}, {"dcp": _TITAN, "hf": ("hf",)}),
    "olmo-core": Target({"dcp": by_olmo_core}, {"dcp": ("olmo-core",)}, "model"),
    "flame": Target({"dcp": by_state_dict}, {"dcp": ("hf",)}),
    "opentad": Target({"pth": by_detector}, {"pth": ("opentad",)}),
    "minimind": Target({"pth": by_minimind}, {"pth": ("minimind",)}),
}
_WRITES_HEAD_TWICE = ("dcp", "pth")  # what a live model's state dict lists, a file of its tensors has to hold


def arranged(target: str | None, to: str, naming: str | None) -> tuple[str | None, bool]:
    """Return the naming that a program asks for, and whether a tied head is written under both names.

    Args:
        target: the program, as the user gave it; None leaves the naming as it is.
        to: the output's format.
        naming: the naming that the user gave; None for the program's own.

    Raises:
        TensorkeepError: there is no such program, or it does not load this format or this naming.

    Example:
        >>> arranged("torchtitan", "dcp", None), arranged("transformers", "hf", None)
        (('torchtitan', True), ('hf', False))
    """
    if target is None:
        return naming, False
    if target not in TARGETS:
        known = near_misses(target, TARGETS) or f"known: {', '.join(TARGETS)}"
        hint = "transformers loads hf folders: --for transformers" if target == "hf" else known
        raise TensorkeepError(f"no program {target!r}", where="--for", hint=hint)
    loads = TARGETS[target].namings
    if to not in loads:
        hint = f"--to {' or '.join(loads)}"
        raise TensorkeepError(f"{target} does not load {to}", where="--for", hint=hint)
    if naming is not None and naming not in loads[to]:
        hint = f"leave --naming out, or --naming {' or '.join(loads[to])}"
        raise TensorkeepError(f"{target} does not load {to} with {naming} names", where="--for", code="K06", hint=hint)
    return naming or loads[to][0], to in _WRITES_HEAD_TWICE and target != "minimind"


def root_of(target: str | None) -> str | None:
    """Return what a program asks names to be below.

    Args:
        target: the program; None where the user names none.

    Returns:
        The root; None for nothing.
    """
    return TARGETS[target].root if target in TARGETS else None


def usual(plan: Plan, to: str) -> str | None:
    """Return the program that a plan's output is for where the user names none; None where nothing says.

    Args:
        plan: what will be written.
        to: its format.
    """
    if to == "peft":
        return "peft"
    if to == "hf":
        return "transformers" if plan.naming in (None, "hf") else None
    named = next((w for w, t in TARGETS.items() if plan.naming in t.namings.get(to, ()) and plan.naming != "hf"), None)
    return named if plan.root == root_of(named) else None


def _unnamed(to: str) -> str:
    """Say why no program's rules were applied where none is named, and which could be."""
    if to == "gguf":
        return "llama.cpp was not run; tensors and metadata were read back here"
    able = [word for word, target in TARGETS.items() if to in target.namings]
    if not able:
        return "no program is known here that loads it"
    *others, last = able
    before = f"{', '.join(others)} or " if others else ""
    return f"name the program that is to load it, --for {before}{last}"


def check(plan: Plan, to: str, name: str, target: str | None = None, programs: Programs = NONE) -> Proof:
    """Apply a program's rules to what is planned.

    Args:
        plan: what will be written.
        to: the format.
        name: the name of the output's file or folder.
        target: the program that the user declared (`--for`); None for the one that the format and the names say.
        programs: what the installed programs themselves say of names and shapes.

    Returns:
        What is proven of the plan: the program and what was compared, or why no program's rules were applied.

    Raises:
        TensorkeepError: the declared program would not find the model in these tensors; or, declared or not, a reader
            would take codes for weights (Q01, Q06).

    Example:
        >>> check(make_plan([read("model")], "hf"), "hf", "out").line  # doctest: +SKIP
        'bytes equal to the plan; loading not checked: transformers is not installed'
    """
    word = target or usual(plan, to)
    if word is None:
        return Proof(why=_unnamed(to))
    sink = Sink(plan, to, name, word, programs)
    try:
        return TARGETS[word].rules[to](sink)
    except TensorkeepError as error:
        if target is not None or error.code in ("Q01", "Q06"):
            raise
        return Proof(objection=error.what)
