"""Make one offline HTML page of several runs: curves over each other, where recipes differ, final figures with spread.

Runs whose recipes are equal but for the seed are repetitions of one thing: they are put together, and mean, standard
deviation and range are told of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._curves import COLOURS, DASHES, Line, curves, swatch
from tensorkeep.commands.report._frame import Section
from tensorkeep.commands.report._series import Figures, Series, read_figures, shown
from tensorkeep.commands.report.run import MAIN, RECIPE, best_of, no_rows, smaller_is_better, told_of
from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import absent
from tensorkeep.storage.yaml_documents import read_yaml

MOST = COLOURS * DASHES  # runs that can be told apart
_BLOCKS = 300  # of a curve
_FEW = 12  # evaluations that are drawn
_SEEDS = ("seed", "training.seed", "data.seed")
_LONG = 160  # letters of a recipe's value that are shown
_ROWS = 400  # of the differences between recipes


class Compared(NamedTuple):
    """A run of the comparison.

    Attributes:
        name: what it is called on the page.
        figures: of its rows.
        recipe: its fields as dotted names with values as text; None where there is none that can be read.
        problem: why there is no recipe.
    """

    name: str
    figures: Figures
    recipe: Mapping[str, str] | None
    problem: str


def compare_page(runs: Sequence[str | Path]) -> str:
    """Return the page of two runs or more.

    Raises:
        TensorkeepError: fewer than two runs, more than can be told apart, or a folder without metrics.
    """
    if not 2 <= len(runs) <= MOST:
        what = f"{len(runs)} runs to compare: there must be 2 to {MOST}"
        raise TensorkeepError(what, hint="tensorkeep report compare RUN RUN -o compared.html")
    found = [_read(Path(run), name) for run, name in zip(runs, _names([str(run) for run in runs]), strict=True)]
    names = list(dict.fromkeys(name for run in found for name, _ in shown(run.figures.evaluations)))
    first = [n for n in (MAIN,) if n in names]
    groups = _groups(found)
    sections = [
        Section("Runs", _legend(found)),
        Section("Loss", _over([(run.name, run.figures.losses.get("loss")) for run in found], "loss", False)),
        Section("Evaluations", _evaluations(found, [*first, *(n for n in names if n not in first)])),
        Section("Learning rate and throughput", _rest(found)),
        Section("Where the recipes differ", _differences(found)),
        Section("Final figures", _finals(found)),
        Section("Final figures with spread", _spread(found, groups)),
    ]
    head = frame.top(f"{len(found)} runs compared", said=_said(found, groups, [*first, *names]))
    return frame.page(f"{len(found)} runs compared", head, sections)


def _said(runs: Sequence[Compared], groups: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Say which run is best in what is told first, and how far apart runs of one recipe are."""
    if names:
        key = f"{names[0]} evaluated, {'least' if smaller_is_better(names[0]) else 'greatest'}"
        what, least, evaluated = names[0], smaller_is_better(names[0]), "evaluated "
    else:
        key, what, least = "loss, mean of the last tenth", "mean loss of the last tenth", True
        evaluated = ""
    values = {n: numbers[key] for n, run in enumerate(runs) if key in (numbers := _numbers(run))}
    parts = _best({runs[n].name: value for n, value in values.items()}, evaluated, what, least)
    if 0 < len(values) < len(runs):
        without = [run.name for n, run in enumerate(runs) if n not in values]
        parts.append(f"Without it: {_some(without)}.")
    if diverged := [run.name for run in runs if (loss := run.figures.losses.get("loss")) and loss.ended_without]:
        parts.append(f"The last loss is no finite number: {_some(diverged)}.")
    for group in groups:
        own = [values[n] for n in group if n in values]
        if len(own) > 1:
            same = "All differ in the seed alone" if len(group) == len(runs) else f"{len(own)} differ in the seed alone"
            parts.append(f"{same}: {frame.figure(fmean(own))} ± {stdev(own):.2g}.")
    return " ".join(parts[:6])


def _best(values: Mapping[str, float], evaluated: str, what: str, least: bool) -> list[str]:
    """Say which runs are best in a number and how far all are apart; runs that are equal are not ranked."""
    if not values:
        return []
    low, high = min(values.values()), max(values.values())
    if low == high and len(values) > 1:
        return [f"All {len(values)} are equal: {evaluated}{told_of(what, low)}."]
    best = low if least else high
    parts = [f"Best {evaluated}{told_of(what, best)}: {_some([n for n, value in values.items() if value == best])}."]
    return parts + ([f"All {len(values)}: {frame.figure(low)} to {frame.figure(high)}."] if len(values) > 1 else [])


def _some(names: Sequence[str]) -> str:
    """Name the first few runs and count the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(run: Path, name: str) -> Compared:
    """Read a run's rows and its recipe."""
    figures = read_figures(run, _BLOCKS)
    if not figures.rows:
        if not run.exists():
            raise absent(run)
        raise no_rows(run)
    try:
        document = read_yaml(run / RECIPE)
    except TensorkeepError as error:
        return Compared(name, figures, None, error.line)
    if not isinstance(document, Mapping):
        return Compared(name, figures, None, f"{run / RECIPE}: is no recipe")
    return Compared(name, figures, _flat(document), "")


def _names(paths: Sequence[str]) -> list[str]:
    """Return short names for folders: their last parts, as many as tell all apart, and a number for one given twice."""
    split = [Path(path).parts or (path,) for path in paths]
    for depth in range(1, max(map(len, split)) + 1):
        names = ["/".join(parts[-depth:]) for parts in split]
        if len(set(names)) == len(set(split)):
            break
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _flat(document: Mapping[Any, Any], before: str = "") -> dict[str, str]:
    """Return nested fields as dotted names, their values as text.

    >>> _flat({"training": {"seed": 1, "adapter": None}})
    {'training.seed': '1', 'training.adapter': 'null'}
    """
    found: dict[str, str] = {}
    for key, value in document.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def _groups(runs: Sequence[Compared]) -> list[list[int]]:
    """Put runs together whose recipes are equal but for the seed; one without a recipe is by itself."""
    known: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        key: object = number
        if run.recipe is not None:
            key = tuple(sorted(item for item in run.recipe.items() if item[0] not in _SEEDS))
        known.setdefault(key, []).append(number)
    return list(known.values())


def _legend(runs: Sequence[Compared]) -> str:
    """Return every run with its line, and a box that hides it."""
    rows = "".join(
        f"<li><label><input type='checkbox' checked data-run='{n}'>{swatch(n)}<span>{frame.text(run.name, 120)}</span>"
        "</label></li>"
        for n, run in enumerate(runs)
    )
    return f"<ul class='runs'>{rows}</ul>" + frame.note("A box that is not ticked hides a run in every picture.")


def _over(series: Sequence[tuple[str, Series | None]], title: str, small: bool) -> str:
    """Draw one number of all runs over each other."""
    lines = [Line(name, one, n) for n, (name, one) in enumerate(series) if one is not None and one.blocks]
    return curves(title, lines, small=small) if lines else ""


def _evaluations(runs: Sequence[Compared], names: Sequence[str]) -> str:
    """Draw every evaluation, the most telling large."""
    if not names:
        return ""
    every = {n: {v for run in runs if (one := run.figures.evaluations.get(n)) for v in _ends(one)} for n in names}
    names = [name for name in names if len(every[name]) > 1] or names[:1]
    drawn = [
        _over([(run.name, run.figures.evaluations.get(name)) for run in runs], f"{name[:80]}, evaluated", n > 0)
        for n, name in enumerate(names[:_FEW])
    ]
    more = frame.note(f"{len(names) - _FEW} more are not drawn") if len(names) > _FEW else ""
    return f"{drawn[0]}<div class='pair'>{''.join(drawn[1:])}</div>{more}"


def _ends(series: Series) -> list[float]:
    """Return the least and the greatest value."""
    return [best[1] for best in (series.best_low, series.best_high) if best is not None]


def _rest(runs: Sequence[Compared]) -> str:
    """Draw learning rate, gradients and pace."""
    drawn = [
        _over([(run.name, run.figures.others.get("lr")) for run in runs], "learning rate", True),
        _over([(run.name, run.figures.others.get("grad_norm")) for run in runs], "norm of the gradients", True),
        _over([(run.name, run.figures.rate) for run in runs], "samples a second", True),
        _over(
            [(run.name, run.figures.others.get("memory")) for run in runs],
            "memory in GiB, the most of the process until then",
            True,
        ),
    ]
    return f"<div class='pair'>{''.join(drawn)}</div>" if any(drawn) else ""


def _differences(runs: Sequence[Compared]) -> str:
    """List the fields in which recipes are not all equal."""
    problems = "".join(frame.note(f"{run.name}: {run.problem}") for run in runs if run.problem)
    known = [(run.name, run.recipe) for run in runs if run.recipe is not None]
    if len(known) < 2:
        return problems
    fields = list(dict.fromkeys(name for _, recipe in known for name in recipe))
    rows = [
        [field, *(_short(recipe.get(field)) for _, recipe in known)]
        for field in fields
        if len({recipe.get(field) for _, recipe in known}) > 1
    ]
    if not rows:
        return problems + frame.note(f"None of their {len(fields)} fields differs.")
    more = frame.note(f"{len(rows) - _ROWS} more fields differ") if len(rows) > _ROWS else ""
    told = frame.note(f"{len(rows)} of {len(fields)} fields differ; a dash: the recipe does not have it.")
    columns = ["field", *(name for name, _ in known)]
    return problems + told + frame.table("Differences", columns, rows[:_ROWS], right=99, names=True) + more


def _short(value: str | None) -> str:
    """Return a field's value for the table."""
    return "-" if value is None else value if len(value) <= _LONG else f"{value[:_LONG]}..."


def _numbers(run: Compared) -> dict[str, float]:
    """Return the final figures of a run by their names."""
    found: dict[str, float] = {}
    loss = run.figures.losses.get("loss")
    if loss and not loss.ended_without and (mean := loss.mean_of_last()) is not None:
        found["loss, mean of the last tenth"] = mean
    for name, series in list(shown(run.figures.evaluations))[:_FEW]:
        if series.last and (best := best_of(name, series)):
            found[f"{name} evaluated, last"] = series.last[1]
            found[f"{name} evaluated, {'least' if smaller_is_better(name) else 'greatest'}"] = best[1]
    if (rate := run.figures.rate.mean_of_last(1.0)) is not None:
        found["samples a second, mean"] = rate
    if (memory := run.figures.others.get("memory")) and memory.best_high:
        found["memory in GiB, the most"] = memory.best_high[1]
    found["steps"] = float(run.figures.last_step)
    return found


def _finals(runs: Sequence[Compared]) -> str:
    """List the final figures, a column a run."""
    numbers = [_numbers(run) for run in runs]
    names = list(dict.fromkeys(name for one in numbers for name in one))
    rows = [[name, *(frame.figure(one.get(name)) for one in numbers)] for name in names]
    return frame.table("Final figures", ["figure", *(run.name for run in runs)], rows)


def _spread(runs: Sequence[Compared], groups: Sequence[Sequence[int]]) -> str:
    """Tell mean, deviation and range of the final figures over the runs of each recipe."""
    parts = [frame.note("Together are runs whose recipes are equal but for the seed.")]
    for group in groups:
        names = [runs[n].name for n in group]
        parts.append(f"<h3>{frame.text(', '.join(names), 600)}</h3>")
        if len(group) < 2:
            parts.append(frame.note("one run: no spread can be told"))
            continue
        numbers = [_numbers(runs[n]) for n in group]
        rows = []
        for name in dict.fromkeys(name for one in numbers for name in one):
            values = [one[name] for one in numbers if name in one]
            deviation = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
            row = [fmean(values), deviation, min(values), max(values)]
            rows.append([name, *map(frame.figure, row), len(values)])
        columns = ["figure", "mean", "standard deviation", "least", "greatest", "runs"]
        parts.append(frame.table(f"Spread over {len(group)} runs", columns, rows))
    return "".join(parts)
