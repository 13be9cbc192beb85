"""Evaluations of a run on the way: when they are due, the best one so far, and when to stop for lack of better ones.

Best value and early stop are read off the evaluation rows, so they are no state of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import figure
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import distributed, metrics, randomness, watchdog
from tensorkeep.training import saver as checkpoint
from tensorkeep.training._logbook import Log, due
from tensorkeep.training._run import Run
from tensorkeep.training.distributed import World
from tensorkeep.training.interruption import Wish
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.precision import autocast


def evaluation_due(run: Run) -> bool:
    """Whether this step is to be evaluated and no row says that it was."""
    loop, step = run.loop, run.step
    asked = due(step, loop.evaluate_every) and step >= loop.evaluate_from
    if run.job.evaluate is None or step == 0 or not (asked or step == loop.updates):
        return False
    return not any(e["step"] == step for e in run.evaluations)


def evaluate_if_due(run: Run, log: Log, wish: Wish) -> None:
    """Evaluate after this step where that is due; note the row, and the best checkpoint.

    Every rank goes by the first one's numbers.
    """
    if not evaluation_due(run):
        return
    with watchdog.doing("evaluation of step", run.step):
        log.doing("evaluation", run.step)
        made = evaluated(run.job, run.world, wish, _precision(run.loop, run.world))
        log.doing(None, run.step)
        found = {name: float(value) for name, value in made.items()}
        numbers: dict[str, Any] = metrics.finite(distributed.gathered(run.world, found)[0])
    name = (run.loop.best or "").removeprefix("-")
    if name and name not in numbers:
        raise TensorkeepError(
            f"there is no {name!r} among what is evaluated",
            where="training.best",
            hint=f"one of {', '.join(sorted(numbers))}; with a minus where smaller is better",
        )
    run.evaluations.append({"step": run.step, **numbers})
    if run.world.first:
        log.write({"step": run.step, "samples": run.samples, "evaluation": numbers}, durable=True)
        shown = ", ".join(f"{k} {'none' if v is None else figure(k, v, 4)}" for k, v in numbers.items() if k != "count")
        run.say.remark(f"step {run.step}: {shown}")
        mark_best(run)


def _precision(loop: Loop, world: World) -> contextlib.AbstractContextManager[Any]:
    """Return the context of an evaluation: shards are gathered in the run's precision, so it must compute in it."""
    return autocast(loop, world) if loop.parallel == "fsdp" and world.size > 1 else contextlib.nullcontext()


def evaluated(
    job: Job,
    world: World,
    wish: Wish,
    precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext(),  # noqa: B008 (holds nothing)
) -> Mapping[str, float]:
    """Evaluate the job's model under its average; afterwards mode and random states are what they were.

    One process may be interrupted in it; of several, one alone must not leave the others waiting.
    """
    assert job.evaluate is not None
    before, training = randomness.capture(), job.model.training
    try:
        with job.ema.applied(job.model) if job.ema else contextlib.nullcontext(), torch.no_grad():
            job.model.eval()
            with wish.may_stop() if world.size == 1 else contextlib.nullcontext(), precision:
                return job.evaluate(job.model)
    finally:
        sharding.forget_whole(job.model)
        job.model.train(training)
        randomness.restore(before)


def best_step(loop: Loop, evaluations: list[dict[str, Any]]) -> int | None:
    """Find the step of the best evaluation, the first of equals; None where none gave the wanted number.

    >>> best_step(Loop(updates=9, batch=1, best="-loss"), [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.5}])
    3
    """
    name = (loop.best or "").removeprefix("-")
    sign = -1.0 if (loop.best or "").startswith("-") else 1.0
    there = [e for e in evaluations if isinstance(e.get(name), float)]
    return max(there, key=lambda e: sign * e[name])["step"] if there else None


def mark_best(run: Run) -> None:
    """Let the file `best` name the step of the best evaluation, where its checkpoint is there."""
    assert run.saver is not None
    step = best_step(run.loop, run.evaluations) if run.loop.best else None
    if step is None or checkpoint.best(run.folder) == step:
        return
    run.saver.wait()
    if step in checkpoint.steps(run.folder):
        checkpoint.mark_best(run.folder, step)
    else:
        run.say.remark(f"the best evaluation is of step {step}, whose checkpoint is gone")


def stops_early(loop: Loop, evaluations: list[dict[str, Any]]) -> bool:
    """Whether `patience` evaluations have come since the best one."""
    if loop.patience is None:
        return False
    best = best_step(loop, evaluations)
    return len([e for e in evaluations if best is None or e["step"] > best]) >= loop.patience
