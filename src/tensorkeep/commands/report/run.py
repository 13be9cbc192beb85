"""Make one offline HTML page of a run: its curves, evaluations, resumes and what was proven of them, its detections.

Works from the run's own files, of any kind of run, in bounded memory. Where `predict` wrote into RUN/predictions,
timelines and an error analysis follow, with true segments and pictures where the run's recipe leads to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._curves import Line, Mark, curves
from tensorkeep.commands.report._frame import Section
from tensorkeep.commands.report._series import Figures, Series, read_figures, shown
from tensorkeep.errors import TensorkeepError, printable, word
from tensorkeep.output import duration, size
from tensorkeep.storage import run_folder
from tensorkeep.storage.budget import read_small
from tensorkeep.training import metrics
from tensorkeep.training.status import STATUS, read_status

PREDICTIONS = "predictions/detections.json"
RECIPE = "recipe.yaml"
_PERCENT = ", percent"
MAIN = f"average_mAP{_PERCENT}"
_MOST = 200  # resumes and checkpoints that are listed
_FEW = 12  # curves of one kind
_OLDER = "Versions before 0.2.0 did not note resumes."


def run_page(run: str | Path) -> str:
    """Return the page of a run's folder.

    Raises:
        TensorkeepError: it has no metrics.
    """
    run = Path(run)
    found = read_figures(run)
    if not found.rows:
        raise no_rows(run)
    resumes = list(itertools.islice(metrics.stream(run / run_folder.CHECKPOINTS / metrics.RESUMES), 10_000))
    sections = [
        Section("Loss", _losses(found, resumes)),
        Section("Evaluations", _evaluations(found)),
        Section("Learning rate and gradients", _others(found)),
        Section("Throughput", _throughput(found)),
        Section("Memory", _memory(found)),
        Section("Resumes and their proofs", _resumes(run, resumes)),
        Section("Checkpoints", _checkpoints(run)),
        *_detections(run),
        Section("Recipe", _recipe(run)),
    ]
    facts = [("folder", frame.code(run))]
    head = frame.top("Run", facts=facts, said=_said(run, found, resumes)) + frame.tiles(_tiles(found, resumes))
    return frame.page(f"Run {printable(str(run), 200)}", head, sections)


def write_run_page(run: str | Path, out: str | Path, overwrite: bool = False) -> None:
    """Write a run's page into a file.

    >>> write_run_page("runs/one", "one.html")  # doctest: +SKIP
    """
    frame.write(run_page(run), out, overwrite)


def no_rows(run: Path) -> TensorkeepError:
    """Return the error for a folder without a row: of a run before its first update, or of no run."""
    if (run / STATUS).is_file():
        hint = f"tensorkeep watch {word(run)} says whether it lives; the command that began it goes on with it"
        return TensorkeepError("is a run that has made no update yet", where=run, hint=hint)
    hint = "a run of `tensorkeep train` writes it; for a diagnosis name its JSON document"
    return TensorkeepError("has no metrics", where=run / metrics.METRICS, hint=hint)


def smaller_is_better(name: str) -> bool:
    """Whether an evaluation's number is the better the smaller it is."""
    return any(word in name.lower() for word in ("loss", "perplexity", "error"))


def best_of(name: str, series: Series) -> tuple[int, float] | None:
    """Return step and value of the best evaluation."""
    return series.best_low if smaller_is_better(name) else series.best_high


def main_number(found: Figures) -> str | None:
    """Return the evaluation that is told first: average mAP, or the first one there is."""
    names = [name for name, _ in shown(found.evaluations)]
    return MAIN if MAIN in names else names[0] if names else None


def _said(run: Path, found: Figures, resumes: Sequence[Mapping[str, Any]]) -> str:
    """Say how far the run came, what it learned and whether its resumes were exact."""
    parts = [_how_far(run, found)]
    loss = found.losses.get("loss")
    if loss and loss.first and loss.last and loss.last[0] > loss.first[0]:
        parts.append(
            f"Loss {loss.first[1]:.4g} at step {loss.first[0]:,}, {loss.last[1]:.4g} at step {loss.last[0]:,}."
        )
    if loss and loss.without:
        parts.append(not_finite(loss))
    if (name := main_number(found)) and (best := best_of(name, found.evaluations[name])):
        parts.append(f"Best evaluated {told_of(name, best[1])}, at step {best[0]:,}.")
    if resumes:
        exact = sum(_verdict(row)[1].startswith("exact") for row in resumes)
        odd = sum(row.get("equal") is False for row in resumes)
        told = f"{odd} not bitwise" if odd else "proven exact" if exact == len(resumes) else f"{exact} proven exact"
        parts.append(f"{len(resumes):,} resume{'s' if len(resumes) > 1 else ''}, {told}.")
    return " ".join(parts)


def not_finite(loss: Series) -> str:
    """Say how many losses are no numbers."""
    rows = loss.without + sum(block.count for block in loss.blocks)
    last = ", the last one too" if loss.ended_without else ""
    return f"The loss is no finite number in {loss.without:,} of {rows:,} rows{last}."


def _how_far(run: Path, found: Figures) -> str:
    """Say at which step a run is, and how it ended where its status says that."""
    try:
        status = read_status(run)
    except TensorkeepError:
        status = None
    if status is None:
        return f"Step {found.last_step:,}."
    state = "interrupted, running or dead" if status["state"] == "running" else status["state"]
    why = f" ({(status['error'] or {}).get('message')})" if state == "failed" and status["error"] else ""
    return f"{state[0].upper()}{state[1:]}{why} at step {found.last_step:,} of {status['updates']:,}."


def told_of(name: str, value: float) -> str:
    """Return an evaluation as it stands in a sentence.

    >>> told_of("average_mAP, percent", 48.2392), told_of("perplexity", 12.5)
    ('average mAP 48.24 %', 'perplexity 12.5')
    """
    unit = " %" if name.endswith(_PERCENT) else ""
    return f"{name.removesuffix(_PERCENT).replace('_', ' ')} {frame.figure(value)}{unit}"


def _tiles(found: Figures, resumes: Sequence[Mapping[str, Any]]) -> list[tuple[object, str]]:
    """Return the figures at the head of the page."""
    tiles: list[tuple[object, str]] = [(f"{found.last_step:,}", "step")]
    loss = found.losses.get("loss")
    if loss and loss.ended_without:
        tiles.append(("no number", "last loss"))
    elif loss and loss.last:
        tiles.append((f"{loss.last[1]:.4g}", "last loss"))
    if (name := main_number(found)) and (best := best_of(name, found.evaluations[name])):
        tiles.append((frame.figure(best[1]), f"best {name.replace('_', ' ')}, step {best[0]:,}"))
    if found.samples:
        tiles.append((f"{found.samples:,}", "samples"))
    if found.seconds:
        tiles.append((duration(found.seconds), "time in updates"))
    if resumes:
        equal = sum(_verdict(row)[1].startswith("exact") for row in resumes)
        tiles.append((f"{equal} of {len(resumes)}", "resumes proven exact"))
    return tiles


def _losses(found: Figures, resumes: Sequence[Mapping[str, Any]]) -> str:
    """Draw the loss, large, and the parts it is made of."""
    marks = [Mark(r["step"], f"resumed from step {r['step']:,}") for r in resumes[-_MOST:]]
    whole = found.losses.get("loss", Series())
    best = whole.best_low if whole.blocks else None
    parts = [curves("loss", [Line("loss", whole)], marks=marks)]
    if whole.without:
        parts.append(frame.note(not_finite(whole)))
    if best is not None:
        after = "; dashed lines are resumes" if marks else ""
        parts.append(frame.note(f"least {frame.figure(best[1])} at step {best[0]:,}{after}"))
    rest = [item for item in shown(found.losses) if item[0] != "loss"]
    return "".join(parts) + _grid(rest)


def _grid(series: Sequence[tuple[str, Series]]) -> str:
    """Draw several small figures, two abreast where there is room."""
    drawn = "".join(curves(name[:80], [Line(name, one)], small=True) for name, one in series[:_FEW])
    more = frame.note(f"{len(series) - _FEW} more are not drawn") if len(series) > _FEW else ""
    return f"<div class='pair'>{drawn}</div>{more}" if drawn else ""


def _evaluations(found: Figures) -> str:
    """Draw what was evaluated, the most telling number first and large, and list the last evaluations."""
    first = main_number(found)
    if first is None:
        return frame.note("no evaluation gave a finite number") if found.last_rows else ""
    best = best_of(first, found.evaluations[first])
    parts = [curves(f"{first.replace('_', ' ')}, evaluated", [Line(first, found.evaluations[first])], best=best)]
    if best is not None:
        parts.append(frame.note(f"best: {frame.figure(best[1])} at step {best[0]:,}"))
    rest = [item for item in shown(found.evaluations) if item[0] != first]
    moved = [(name, one) for name, one in rest if not _constant(one)]
    parts.append(_grid([(f"{name}, evaluated", one) for name, one in moved]))
    names = list(found.evaluations)[:_FEW]
    rows = [[f"{step:,}", *(_four(numbers.get(name)) for name in names)] for step, numbers in reversed(found.last_rows)]
    return "".join(parts) + frame.table("The last evaluations", ["step", *names], rows)


def _constant(series: Series) -> bool:
    """Whether a number is the same in every evaluation of several: a table says it as well as a picture."""
    low, high = series.best_low, series.best_high
    return len(series.blocks) > 1 and low is not None and high is not None and low[1] == high[1]


def _four(value: Any) -> str:
    """Return a figure of an evaluation."""
    plain = isinstance(value, float) and math.isfinite(value) and abs(value) < 1e6
    return f"{value:.4f}" if plain else frame.figure(value)


def _others(found: Figures) -> str:
    """Draw the learning rate, the norm of the gradients, and what else the rows hold."""
    spoken = {"lr": "learning rate", "grad_norm": "norm of the gradients, before clipping"}
    drawn = [(spoken.get(name, name), one) for name, one in shown(found.others) if name != "memory"]
    return _grid(drawn)


def _throughput(found: Figures) -> str:
    """Draw samples a second, and what is counted a second."""
    named = [
        ("samples a second", found.rate),
        ("counted in the loss (tokens, pairs, positives) a second", found.counted),
    ]
    return _grid([item for item in named if item[1].blocks])


def _memory(found: Figures) -> str:
    """Draw how much memory was held at most: of the GPU, without one of the machine."""
    series = found.others.get("memory")
    if series is None or not series.blocks or series.best_high is None:
        return ""
    most = frame.note(f"most: {series.best_high[1]:.4g} GiB at step {series.best_high[0]:,}")
    return curves("memory in GiB, the most of the process until then", [Line("memory", series)], small=True) + most


def _resumes(run: Path, resumes: Sequence[Mapping[str, Any]]) -> str:
    """List every start that went on, and what its losses were compared with."""
    noted = _noted(run)
    if not resumes:
        older = "" if (run / STATUS).is_file() else f" {_OLDER}"
        return frame.note(f"No resume was noted. {noted}{older}")
    rows = [[f"{n:,}", f"{row['step']:,}", *_verdict(row)] for n, row in enumerate(resumes, 1)]
    more = frame.note(f"{len(rows) - _MOST:,} earlier ones are not listed") if len(rows) > _MOST else ""
    listed = frame.table(
        "Resumes", ["resume", "from step", "losses made again", "what that says"], rows[-_MOST:], right=9
    )
    return listed + more + frame.note(noted)


def _noted(run: Path) -> str:
    """Say what is noted for resumes to come."""
    count = sum(1 for _ in metrics.stream(run / run_folder.CHECKPOINTS / metrics.PROOF))
    if not count:
        return "No losses are noted that a resume would be compared with."
    told = "1 step" if count == 1 else f"{count:,} steps"
    return f"The losses of {told} after checkpoints are noted: a resume makes them again and is compared."


def _verdict(row: Mapping[str, Any]) -> list[str]:
    """Return which steps a resume made again, and whether their losses were equal."""
    steps = row.get("steps")
    named = ", ".join(f"{step:,}" for step in steps[:8] if isinstance(step, int)) if isinstance(steps, list) else ""
    if row.get("equal") is True and named:
        return [f"steps {named}", "exact: equal to the losses before, bit for bit"]
    if row.get("equal") is False and named:
        was, now = (_loss(row.get(key)) for key in ("was", "now"))
        differs = row.get("differs")
        facts = ", ".join(map(str, differs[:8])) if isinstance(differs, list) and differs else ""
        why = f"differs in {facts}" if facts else "nothing in torch, device, threads or split differs"
        return [f"step {named}", f"not bitwise what it was: loss {was}, then {now}; {why}"]
    return ["none", "nothing to compare: no later step had been made before"]


def _loss(value: Any) -> str:
    """Return a loss of a row, which is in hexadecimal there."""
    try:
        return repr(float.fromhex(value))
    except (TypeError, ValueError, OverflowError):
        return "?"


def _checkpoints(run: Path) -> str:
    """List the checkpoints that are there, with their sizes."""
    try:
        steps = run_folder.steps(run)
        marks = {which: run_folder.named_step(run, which) for which in ("latest", "best")}
    except TensorkeepError as error:
        return frame.note(error.line)
    rows = []
    for step in steps[:_MOST]:
        folder = run_folder.folder_of(run, step)
        held = sum(path.lstat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        rows.append([f"{step:,}", ", ".join(which for which, at in marks.items() if at == step), size(held)])
    more = frame.note(f"{len(steps) - _MOST:,} earlier ones are not listed") if len(steps) > _MOST else ""
    return frame.table("Checkpoints", ["step", "named", "size"], rows, right=2) + more


def _detections(run: Path) -> list[Section]:
    """Return what is told of a run's predictions."""
    if not (run / PREDICTIONS).is_file():
        return []
    from tensorkeep.commands.report.detections import sections_of_run

    return sections_of_run(run, run / PREDICTIONS)


def _recipe(run: Path) -> str:
    """Return the recipe's text, behind a click."""
    path = run / RECIPE
    if not path.is_file():
        return ""
    try:
        words = read_small(path, 256 << 10).decode("utf-8", "replace")
    except TensorkeepError as error:
        return frame.note(error.line)
    lines = "\n".join(frame.text(line, 2000) for line in words.splitlines()[:2000])
    return frame.folded("The recipe with every field", f"<pre>{lines}</pre>")
