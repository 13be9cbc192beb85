"""`tensorkeep train language` and `eval language`; what every `train` command shares is `trained`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tensorkeep.commands.shared import Flag, Say, prepare
from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output, figure

if TYPE_CHECKING:
    from tensorkeep.training.distributed import World
    from tensorkeep.training.job import Job, Loop
    from tensorkeep.training.saver import State
    from tensorkeep.training.sections import CheckpointConfig

    Start = tuple[Job, Loop, str | State]

Changes = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Several = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]


def train_language(
    recipe: Path,
    /,
    *changes: Changes,
    out: Path | None = None,
    resume: str = "auto",
    allow: Several = (),
    device: str | None = None,
    print_recipe: Flag = False,
    say: Say = Say(),
) -> int:
    """Train a language model as a recipe says; the same command again goes on where the run stopped.

    Any field of the recipe can be changed by its dotted name (--training.updates 100 --data.files '[a.jsonl]'), the
    common ones by a short name (--lora_r 16 --quantize_backbone nf4). Exit code 130 when interrupted, after saving.

    Parameters
    ----------
    recipe
        A recipe (YAML), or the name of one that is shipped (`tensorkeep recipe list`); a run's own recipe.yaml goes
        on with it.
    out
        The run's folder: recipe.yaml, metrics.jsonl, checkpoints.
    resume
        auto: the newest valid checkpoint. never: refuse a folder that has some. Or a run or checkpoint to start from;
        or MiniMind's NAME_resume.pth, to be given every time: micro_batch and epochs are then its flags.
    allow
        A field that may differ from the run's checkpoint on purpose (training.updates); may be given several times.
    device
        cpu or cuda. Default: a GPU where there is one.
    print_recipe
        Print the recipe with every default, and train nothing.
    """
    from tensorkeep.language import job as language
    from tensorkeep.language.recipe_text import read_language

    printer, said = say.output(), list[str]()
    made = read_language(recipe, pairs_of(changes), said.append)
    if print_recipe:
        return printed(made, said, printer)

    def start(run: Path, world: World) -> Start:
        remark = printer.remark if world.first else lambda _: None
        say_old(said, remark)
        if made.continued_from is not None and not resume.endswith(".pth"):
            hint = "--resume NAME_resume.pth, with every start of the run"
            raise TensorkeepError("the run goes on from MiniMind's resume file", where="continued_from", hint=hint)
        job = language.build(made, run, world, remark)
        loop = language.loop_of(made, len(job.data))
        return language.continued(made, resume, job, loop, remark) if resume.endswith(".pth") else (job, loop, resume)

    return trained(start, out, allow, device, printer, made.checkpoint, made.training.watchdog)


def say_old(said: Sequence[str], remark: Callable[[str], None]) -> None:
    """Say what a recipe or a flag calls otherwise than this version does."""
    for line in said:
        remark(f"note: {line}")


def printed(recipe: Any, said: Sequence[str], printer: Output) -> int:
    """Print a recipe with every default, and say what it calls otherwise; for `--print-recipe`."""
    from tensorkeep.training.recipe import plain, to_yaml

    say_old(said, printer.remark)
    if printer.json:
        printer.document({"recipe": plain(recipe)})
    printer.line(to_yaml(recipe).rstrip("\n"))
    return 0


def trained(
    start: Callable[[Path, World], Start],
    out: Path | None,
    allow: Sequence[str],
    device: str | None,
    printer: Output,
    checkpoint: CheckpointConfig,
    watched: float | None,
) -> int:
    """What every `train` command does once its recipe is read: join the group, build, fit, tell.

    `start(run, world)` makes job and loop, and says what to resume from; `fit` writes RUN/recipe.yaml from the job.
    `watched` is the recipe's `training.watchdog`. Returns the exit code: 130 when the run was interrupted and saved.
    """
    from tensorkeep.training import distributed, preflight, watchdog
    from tensorkeep.training.loop import fit

    if out is None:
        raise TensorkeepError("the run needs a folder", hint="add --out RUN, the folder that it is kept in")
    world = distributed.start(device, watched)
    try:
        with watchdog.watching(out, world.rank, world.size, watched, printer.json), distributed.peers_named(out, world):
            hosts = preflight.folders(out, world, checkpoint)
            if hosts is not None:
                world = replace(world, here=hosts.leads)
            if world.first:
                prepare(printer, out / "recipe.yaml")
            watchdog.at("building", busy=True)
            job, loop, resume = start(out, world)
            outcome = fit(job, out, loop, resume, world, tuple(allow), printer)
    finally:
        distributed.stop()
    if not world.first:
        return 130 if outcome.reason == "interrupted" else 0
    shown = {"run": str(out), "step": outcome.step, "samples": outcome.samples, "reason": outcome.reason}
    if printer.json:
        printer.document({**shown, "evaluation": outcome.evaluation, "resumed": outcome.level})
    numbers = "".join(
        f", {name} {figure(name, value)}" for name, value in outcome.evaluation.items() if name != "count"
    )
    printer.line(f"{out}: {outcome.reason} at step {outcome.step}, {outcome.samples} samples{numbers}")
    if outcome.reason == "interrupted":
        printer.remark(f"hint: the same command goes on from step {outcome.step}")
        return 130
    return 0


def pairs_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--name value` and `--name=value` as pairs.

    >>> pairs_of(["--training.updates", "10", "--optimizer.lr=1e-3"])
    [('training.updates', '10'), ('optimizer.lr', '1e-3')]
    """
    found, at = [], 0
    while at < len(words):
        word = words[at]
        if not word.startswith("--"):
            raise TensorkeepError(
                f"{word!r} is neither a flag nor a value of one", hint="a field is set by --name VALUE"
            )
        name, equals, value = word[2:].partition("=")
        if not equals:
            at += 1
            if at == len(words):
                raise TensorkeepError(f"--{name} needs a value", hint=f"--{name} VALUE")
            value = words[at]
        found.append((name, value))
        at += 1
    return found
