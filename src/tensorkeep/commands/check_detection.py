"""`tensorkeep check detection`."""

from __future__ import annotations

from pathlib import Path

from tensorkeep.commands.shared import Say
from tensorkeep.commands.train_language import Changes, pairs_of, say_old


def check_detection(recipe: Path, /, *changes: Changes, say: Say = Say()) -> int:
    """Check what a detection recipe would train on, before the first update; nothing is trained or written.

    Annotations against files (missing, cut short, other durations), against the class map, and against the grid: which
    actions no point of the pyramid can learn (in frames instead of seconds, swapped, past the end, shorter than a step,
    longer than a window), and how many points of each level an epoch is expected to teach. `train detection` does the
    same at its start. Feature files are read whole: their axes, NaN and infinity. The pretrained weights that the
    recipe names are held against its backbone, by names and shapes; a frozen backbone without any is told of. Exit code
    1 where something is odd.

    Parameters
    ----------
    recipe
        A recipe (YAML), or the name of one that is shipped (`tensorkeep recipe list`). Fields can be changed as in
        `train detection`.
    """
    from tensorkeep.detection.job import check
    from tensorkeep.detection.recipe.text import read_recipe
    from tensorkeep.detection.start import check_pretrained
    from tensorkeep.errors import TensorkeepError

    printer, said, files = say.output(), list[str](), list[str]()
    made = read_recipe(recipe, pairs_of(changes), said.append)
    say_old(said, printer.remark)
    with printer.progress("videos") as progress:
        found = check(made, files.append, progress)
    weights: str | None = None
    try:
        if note := check_pretrained(made):
            printer.remark(note)
    except TensorkeepError as error:
        weights = str(error)
    odd = bool(found.problems or files or weights)
    if printer.json:
        printer.document({"recipe": str(recipe), **found.document(), "files": files, "weights": weights})
        return 1 if odd else 0
    if found.videos:
        lost = f"{found.lost} of them cannot be learned" if found.lost else "all can be learned"
        printer.line(f"{found.videos} training videos, {found.actions} actions: {lost}")
        rows = [
            ("every step" if s == 1 else f"every {s} steps", f"{a:g} to {b:g}", f"{n:.1f}")
            for s, (a, b), n in zip(made.model.head.strides, made.model.head.ranges, found.levels, strict=True)
        ]
        columns = ["points of the pyramid", "steps to an action's ends", "points that learn in an epoch"]
        printer.table(columns, rows, right=columns[1:])
    if found.cache:
        printer.line(f"data.cache: {found.cache}")
    for line in files:
        printer.line(line)
    for problem in found.problems:
        printer.line(f"{problem.severity}: {problem.video or 'annotations'}: {problem.message}")
    if weights is not None:
        printer.line(f"error: weights of the backbone: {weights}")
    return 1 if odd else 0
