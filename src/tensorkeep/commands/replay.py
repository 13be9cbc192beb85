"""`tensorkeep replay`: steps of a training made again from its checkpoint and data, compared bit for bit."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorkeep.commands.shared import Say
from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.output import Output

if TYPE_CHECKING:
    from tensorkeep.training.job import Job, Loop

_COMPARED = ("loss", "lr", "grad_norm", "count")  # of a row of metrics; times and memory are not the run's


def replay(run: str, /, *, steps: str, device: str | None = None, say: Say = Say()) -> int:
    """Make steps of a run again from the checkpoint before them and its data, and say whether they are equal.

    Losses are compared with those that proof.jsonl and metrics.jsonl noted, checkpoints tensor by tensor; nothing is
    written into the run. Exit code 1 where something differs, 3 where nothing was noted of these steps, or the machine
    is another and bits may differ.

    Args:
        run: The run's folder.
        steps: Which steps, e.g. 120..122, or one.
        device: cpu or cuda. Default: a GPU where there is one.
    """
    out = say.output()
    first, last = _span(steps)
    found = replayed(run, first, last, device, out)
    if say.json:
        out.document({"run": run, "steps": [first, last], "verdict": found.verdict, **found.to_json()})
        return found.exit_code
    for line in found.lines:
        out.line(line)
    why = f" ({', '.join(found.why)})" if found.why else ""
    out.line(
        {
            "equal": f"equal: steps {first} to {last} of {run}, made again from step {found.start}"
            f" ({found.compared} comparisons, of {len(found.steps)} steps)",
            "differs": f"differs: {len(found.differing)} of {found.compared} comparisons, first {found.first}",
            "inconclusive": f"inconclusive: {found.first}{why}",
        }[found.verdict]
    )
    return found.exit_code


@dataclass
class Replayed:
    """What came of making steps again.

    Attributes:
        start: the step of the checkpoint that they were made from; 0 for the start of the run.
        compared: how many losses, rows and checkpoints were compared.
        steps: those that something was compared of.
        differing: what differed, each in a sentence.
        lines: what was compared, for people.
        why: what of the machine or the plan is another than it was, so that bits may differ.
    """

    start: int
    compared: int = 0
    steps: set[int] = field(default_factory=set)
    differing: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The first difference, or what there was not."""
        return self.differing[0] if self.differing else "nothing was noted of these steps"

    @property
    def verdict(self) -> str:
        """One word: "equal", "differs", or "inconclusive"."""
        if not self.compared or (self.differing and self.why):
            return "inconclusive"
        return "differs" if self.differing else "equal"

    @property
    def exit_code(self) -> int:
        """The exit code of the command."""
        return {"equal": 0, "differs": 1, "inconclusive": 3}[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the document."""
        return {
            "from_step": self.start,
            "compared": self.compared,
            "differing": self.differing,
            "machine_differs": self.why,
        }

    def note(self, step: int, what: str, wrong: str | None) -> None:
        """Note one comparison.

        Args:
            step: of what was compared.
            what: was compared.
            wrong: how it differs; None where it is equal.
        """
        self.compared += 1
        self.steps.add(step)
        what = f"step {step}, {what}"
        self.lines.append(f"{what}: {wrong or 'equal'}")
        if wrong is not None:
            self.differing.append(f"{what}: {wrong}")


def replayed(run: str | Path, first: int, last: int, device: str | None = None, out: Output | None = None) -> Replayed:
    """Make steps of a run again in a temporary folder and compare what it noted of them.

    Args:
        run: the run's folder.
        first: the first step.
        last: the last one.
        device: "cpu" or "cuda"; None: a GPU where there is one.
        out: where remarks and the status line go; None: nowhere.

    Returns:
        What was compared, and what differed.

    Raises:
        TensorkeepError: no run is there, no checkpoint before these steps can be used, or its data or base are others.

    Example:
        >>> replayed("runs/one", 120, 122).verdict              # doctest: +SKIP
        'equal'
    """
    from tensorkeep.storage import run_folder
    from tensorkeep.storage.files import absent
    from tensorkeep.storage.run_folder import steps as saved_steps
    from tensorkeep.training import distributed
    from tensorkeep.training.loop import fit

    folder, say = Path(run), out or Output(quiet=True)
    before = [step for step in saved_steps(folder) if step < first]
    if not folder.exists():
        raise absent(run)
    if not (folder / "recipe.yaml").is_file() or not (folder / run_folder.CHECKPOINTS).is_dir():
        raise TensorkeepError(
            "is no run: recipe.yaml or checkpoints are not in it",
            hint="name the folder of `tensorkeep train --out RUN`",
            where=run,
        )
    start = run_folder.folder_of(folder, before[0]) if before else None
    world = distributed.start(device)
    try:
        if world.size > 1:
            raise TensorkeepError("makes steps again in one process", where="replay", hint="run it without torchrun")
        with tempfile.TemporaryDirectory(prefix="tensorkeep-") as place:
            again = Path(place) / folder.resolve().name
            job, loop = _built(folder, again, world, say)
            job.trackers = []
            if last > loop.updates:
                what = f"step {last} is asked for, and the run ends at step {loop.updates}"
                raise TensorkeepError(what, where=run, hint=f"--steps 1..{loop.updates}, or a part of them")
            wanted = replace(loop, updates=last, log_every=1, patience=None)
            fit(job, again, wanted, str(start) if start else "never", world, ("training.updates",), say)
            from_step = before[0] if before else 0
            why = [*_schedule(folder, from_step, loop.updates), *_machine(folder, again, from_step, last)]
            return _compared(folder, again, from_step, first, last, why)
    finally:
        distributed.stop()


def _span(text: str) -> tuple[int, int]:
    """Read `120..122` or `120`.

    >>> _span("120..122"), _span("7")
    ((120, 122), (7, 7))
    """
    found = re.fullmatch(r"(\d{1,12})(?:\.\.(\d{1,12}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise TensorkeepError(f"{text[:40]!r} names no steps", where="--steps", hint="e.g. --steps 120..122")
    return first, last


def _built(folder: Path, again: Path, world: Any, say: Output) -> tuple[Job, Loop]:
    """Make the job of a run's recipe anew, with what it writes in another folder."""
    from tensorkeep.commands.export import run_at

    path = folder / "recipe.yaml"
    found = run_at(str(folder))
    if found is not None and found.detection:
        from tensorkeep.detection.job import build
        from tensorkeep.detection.recipe.text import read_recipe

        return build(read_recipe(path), again, world, say.remark)
    from tensorkeep.language import job as language
    from tensorkeep.language.recipe_text import read_language

    recipe = read_language(path)
    if recipe.continued_from is not None:
        raise TensorkeepError("goes on from MiniMind's resume file, whose steps are not made again", where=folder)
    made = language.build(recipe, again, world, say.remark)
    return made, language.loop_of(recipe, len(made.data))


def _schedule(folder: Path, start: int, updates: int) -> list[str]:
    """Say where the run was to have another length then, so that its rates followed another schedule."""
    from tensorkeep.storage.run_folder import folder_of
    from tensorkeep.storage.run_folder import steps as saved_steps

    noted = [start] if start else sorted(saved_steps(folder))[:1]
    then = [_state(folder_of(folder, step)).get("updates") for step in noted]
    return [f"training.updates was {was}, is {updates}" for was in then if was not in (None, updates)]


def _machine(folder: Path, again: Path, start: int, last: int) -> list[str]:
    """List what of this machine and process is another than it was when the run was trained."""
    from tensorkeep.storage.run_folder import folder_of
    from tensorkeep.storage.run_folder import steps as saved_steps

    noted = [start, *sorted(saved_steps(folder))] if start else sorted(saved_steps(folder))
    if not noted:
        return []
    then, now = (_facts(folder_of(place, step)) for place, step in ((folder, noted[0]), (again, last)))
    return [f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value]


def _facts(step: Path) -> dict[str, Any]:
    """Return what a checkpoint notes of its machine: versions, device, threads."""
    found = _state(step).get("facts")
    return found if isinstance(found, dict) else {}


def _state(step: Path) -> dict[str, Any]:
    """Return a checkpoint's own document."""
    from tensorkeep.storage.budget import read_small
    from tensorkeep.storage.certificate import parse_json

    document = parse_json(read_small(step / "state.json"), step / "state.json")
    return document if isinstance(document, dict) else {}


def _compared(folder: Path, again: Path, start: int, first: int, last: int, why: list[str]) -> Replayed:
    """Compare losses, rows and checkpoints of the steps."""
    from tensorkeep.storage.run_folder import steps as saved_steps
    from tensorkeep.training import metrics

    out = Replayed(start, why=why)
    rows = {row["step"]: row for row in metrics.rows(again / metrics.METRICS) if "loss" in row}
    for row in metrics.rows(folder / "checkpoints" / metrics.PROOF):
        step, noted = row["step"], row.get("loss")
        if first <= step <= last and "loss" in row:
            now = float(rows[step]["loss"]).hex()
            out.note(step, "loss of proof.jsonl", None if now == noted else f"was {shown(noted)}, is {now}")
    for row in metrics.rows(folder / metrics.METRICS):
        if first <= (step := row["step"]) <= last and "loss" in row:
            odd = [k for k in _COMPARED if k in row and row[k] != rows[step].get(k)]
            wrong = ", ".join(f"{k} was {row[k]!r}, is {rows[step].get(k)!r}" for k in odd)
            out.note(step, "row of metrics.jsonl", wrong or None)
    for step in sorted({*saved_steps(folder)} & {*saved_steps(again)}):
        if first <= step <= last:
            out.note(step, "checkpoint", _state_differs(folder, again, step))
    for path in (folder / "checkpoints" / metrics.PROOF, folder / metrics.METRICS):
        if left := metrics.no_rows(path):
            out.lines.append(f"{path.name}: {left} lines at its end are no rows, so not compared")
    if out.steps and (bare := [step for step in range(first, last + 1) if step not in out.steps]):
        named = ", ".join(map(str, bare[:8])) + (", ..." if len(bare) > 8 else "")
        out.lines.append(f"nothing was noted of {len(bare)} of {last - first + 1} steps: {named}")
    return out


def _state_differs(folder: Path, again: Path, step: int) -> str | None:
    """Compare weights, moments and averages of two checkpoints; None where every tensor is equal in every bit."""
    from tensorkeep.storage.run_folder import folder_of
    from tensorkeep.training.saver import load

    one, other = load(folder_of(folder, step)), load(folder_of(again, step))
    count, odd = 0, []
    for part in ("model", "optimizer", "ema"):
        mine, theirs = getattr(one, part), getattr(other, part)
        count += len({*mine, *theirs})
        odd += [f"{part} {n}" for n in sorted({*mine, *theirs}) if not _same(mine.get(n), theirs.get(n))]
    return f"{len(odd)} of {count} tensors differ, first {odd[0]}" if odd else None


def _same(one: Any, other: Any) -> bool:
    """Say whether two tensors have the same bytes."""
    import torch

    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
