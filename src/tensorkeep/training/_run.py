"""A run under way: what `fit` was given, and where the run stands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tensorkeep.output import Output
from tensorkeep.training._graphs import Recorded
from tensorkeep.training._names import Names
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.status import STATUS, StatusFile, finished, ours

if TYPE_CHECKING:
    from tensorkeep.training.hosts import Hosts
    from tensorkeep.training.saver import Saver


@dataclass
class Run:
    """What `fit` was given and made for a run, and where the run stands.

    Args:
        job: the live objects.
        folder: the run's folder.
        loop: how long, in what portions.
        world: this process among its peers.
        say: where remarks go.
        scaler: torch's gradient scaler, enabled for fp16 alone.
        saver: writes checkpoints; the first rank's, in a sharded run every rank's, else None.
        data: what `_resume.data_facts` says of the data.
        hosts: where every host keeps its own ranks' shards; None: all ranks share the folder.
        recorded: forward and backward of a micro-batch as a CUDA graph (None: they are launched kernel by kernel).
        step: updates made.
        samples: samples consumed by them, over all ranks.
        evaluations: what each evaluation gave, `{"step": ..., name: value}`.
        level: how exact the resume was, None where the run began anew.
        status: the run's status.json, on the first rank once the start is through.
        names: where the tensors that are saved lie in the model.
    """

    job: Job
    folder: Path
    loop: Loop
    world: World
    say: Output
    scaler: Any
    saver: Saver | None
    data: dict[str, Any]
    hosts: Hosts | None = None
    recorded: Recorded | None = None
    step: int = 0
    samples: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    level: str | None = None
    status: StatusFile | None = None
    names: Names = field(default_factory=Names)


def trained(job: Job) -> list[Tensor]:
    """List the parameters that the optimizer changes."""
    return [p for group in job.optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def told(run: Run) -> Iterator[None]:
    """Keep status.json for the body: that the run is under way, and what ended it where it fails."""
    if run.world.first and not ours(run.folder):
        run.say.remark(f"note: {run.folder / STATUS} is no run's, so `tensorkeep watch` is told nothing")
    elif run.world.first and not finished(run.folder, run.step, run.loop.updates):
        fixed = {"updates": run.loop.updates, "batch": run.loop.batch, "pace": list(run.job.pace)}
        run.status = StatusFile(run.folder, {**fixed, "ranks": run.world.size, "level": run.level})
        run.status.note(step=run.step, resumed=run.step if run.level else None)
    try:
        yield
    except BaseException as error:
        if run.status:
            run.status.failed(error)
        raise
