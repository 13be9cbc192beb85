"""`tensorkeep train detection`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tensorkeep.commands.shared import Flag, Say
from tensorkeep.commands.train_language import Changes, Several, pairs_of, printed, say_old, trained

if TYPE_CHECKING:
    from tensorkeep.training.distributed import World
    from tensorkeep.training.job import Job, Loop
    from tensorkeep.training.saver import State


def train_detection(
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
    """Train a temporal action detector as a recipe says; the same command again goes on where the run stopped.

    Any field of the recipe can be changed by its dotted name (--training.epochs 30 --data.test.subset validation), the
    common ones by a short name (--lora-r 16 --quantize-backbone nf4 --window-size 512). Exit code 130 when interrupted,
    after saving. Under torchrun each process takes its part of every batch and of every evaluation.

    Parameters
    ----------
    recipe
        A recipe (YAML), or the name of one that is shipped (`tensorkeep recipe list`); a run's own recipe.yaml goes
        on with it.
    out
        The run's folder: recipe.yaml, metrics.jsonl, checkpoints, and base where frozen weights are in no file.
    resume
        auto: the newest valid checkpoint. never: refuse a folder that has some. Or a run or checkpoint to start from,
        or OpenTAD's epoch_N.pth to go on from.
    allow
        A field that may differ from the run's checkpoint on purpose (training.epochs); may be given several times.
    device
        cpu or cuda. Default: a GPU where there is one.
    print_recipe
        Print the recipe with every default, and train nothing.
    """
    from tensorkeep.detection.recipe.text import read_recipe

    printer, said = say.output(), list[str]()
    made = read_recipe(recipe, pairs_of(changes), said.append)
    if print_recipe:
        return printed(made, said, printer)

    def start(run: Path, world: World) -> tuple[Job, Loop, str | State]:
        from tensorkeep.detection.job import build, continued

        remark = printer.remark if world.first else lambda _: None
        say_old(said, remark)
        job, loop = build(made, run, world, remark)
        return job, loop, continued(made, resume, run, job, remark) if resume.endswith(".pth") else resume

    return trained(start, out, allow, device, printer, made.checkpoint, made.training.watchdog)
