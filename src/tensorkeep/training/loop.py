"""The loop: batches, updates, and between updates logging, saving and evaluating. The only loop there is.

State is saved at update boundaries and nowhere else. A step's rows are on the disk before its checkpoint, the
checkpoint before its evaluation: a run killed anywhere goes on from its last checkpoint and says every row once. Best
value and early stop are read off the evaluation rows, so they are no state of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.training import _resume as resuming
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import distributed, metrics, randomness
from tensorkeep.training import saver as checkpoint
from tensorkeep.training._graphs import Recorded
from tensorkeep.training._logbook import Log, Update, due
from tensorkeep.training._proof import Proof
from tensorkeep.training.batches import Stream, batches, to_device
from tensorkeep.training.distributed import World
from tensorkeep.training.interruption import Interrupted, Wish, listening
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.saver import Saver, State

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RECIPE = "recipe.yaml"
Reason = Literal["done", "stopped early", "interrupted"]


@dataclass
class Progress:
    """Where a run is: updates made, samples consumed over all ranks, and what its evaluations gave."""

    step: int = 0
    samples: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # {"step": ..., name: value}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `level`: how exact the resume was, None where it began anew."""

    step: int
    samples: int
    reason: Reason
    evaluation: dict[str, float]
    level: str | None = None


@dataclass
class _Run:
    """A run under way: what `fit` was given and what it holds for it. `saver`: the first rank's."""

    job: Job
    folder: Path
    loop: Loop
    world: World
    say: Output
    scaler: Any
    saver: Saver | None
    data: dict[str, Any]  # what `resuming.data_facts` says
    recorded: Recorded | None = None  # forward and backward, where they are a CUDA graph
    progress: Progress = field(default_factory=Progress)
    level: str | None = None


def fit(
    job: Job,
    run: str | Path,
    loop: Loop,
    resume: str | Path | State = "auto",
    world: World | None = None,
    allow: tuple[str, ...] = (),
    say: Output | None = None,
) -> Outcome:
    """Train `job` in the folder `run`, from its newest valid checkpoint where there is one.

    The model must lie on `world.device`. Killed at any instant and called again with the same job, it ends bitwise
    where it would have ended (same machine and world size). Raises TensorkeepError where the job is not the one that
    was saved, a loss is not finite, or a save fails; checkpoints that are there stay.

    >>> outcome = fit(job, "runs/one", Loop(updates=1000, batch=32))              # doctest: +SKIP
    """
    folder, world, say = Path(run), world or World(), say or Output(quiet=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=loop.precision == "fp16")
    loop = _possible(loop, world, say)
    _set_out(job, loop, world)
    # once the lock is held nobody else writes into the run
    with randomness.deterministic(loop.deterministic), _saving(folder, loop, world) as saver:
        going = _Run(job, folder, loop, world, say, scaler, saver, resuming.data_facts(job))
        _start(going, resume, allow)
        model = job.model if loop.graph or loop.parallel == "fsdp" else distributed.parallel(job.model, world)
        if loop.graph:  # it knows nothing of DDP's hooks: `update` adds up the ranks' gradients
            distributed.same_start(world, _trained(job))
            going.recorded = Recorded(lambda batch, divisor: share(going, model, batch, divisor, 1), _trained(job))
        with listening() as wish:
            reason = _go(going, model, wish)
            if saver:
                saver.wait()
    progress = going.progress
    last = progress.evaluations[-1] if progress.evaluations else {}
    return Outcome(progress.step, progress.samples, reason, {k: v for k, v in last.items() if k != "step"}, going.level)


def _go(run: _Run, model: nn.Module, wish: Wish) -> Reason:
    """The loop itself."""
    job, loop, world, progress = run.job, run.loop, run.world, run.progress
    saved = progress.step  # the newest step with a checkpoint; none is made of a run that has not begun
    proof = Proof(
        run.folder, resuming.facts(loop, world), saved if run.level else None, run.say if world.first else None
    )
    log = Log(run.folder, job, loop, world, run.scaler, run.say)
    parts = _batches(run)
    try:
        while True:
            _evaluate_if_due(run, log, wish)  # first of all the one that a kill kept from happening
            if progress.step >= loop.updates:
                return "done"
            if stops_early(loop, progress.evaluations):
                return "stopped early"
            made = None if world.size == 1 and wish.signal else update(run, model, next(parts), wish)
            if made is None:
                if progress.step > saved:
                    _save(run)
                return "interrupted"
            progress.step, progress.samples = progress.step + 1, progress.samples + loop.batch
            proof.note(progress.step, made.losses["loss"], world)
            log.note(progress.step, progress.samples, made)
            if due(progress.step, loop.save_every) or progress.step == loop.updates or _evaluation_due(run):
                _save(run)
                saved = progress.step
                proof.saved(saved)
    except Interrupted:
        return "interrupted"
    finally:
        parts.close()
        proof.close()
        log.close()


def _batches(run: _Run) -> Generator[list[Any], None, None]:
    job, loop, world, progress = run.job, run.loop, run.world, run.progress
    stream = Stream(loop.seed, len(job.data), job.orders)
    micro = loop.micro or math.ceil(loop.batch / world.size)
    found = batches(
        job.data,
        job.collate,
        stream,
        progress.samples,
        loop.updates - progress.step,
        loop.batch,
        micro,
        world.rank,
        world.size,
        loop.workers,
        pin=world.device.type == "cuda",
    )
    return cast("Generator[list[Any], None, None]", found)


def update(run: _Run, model: nn.Module, parts: list[Any], wish: Wish) -> Update | None:
    """One update: every micro-batch forward and backward, the exchange of gradients with the last, clip, step, EMA.

    None where a rank was asked to stop: nothing has changed then, on any of them.
    """
    job, loop, world, scaler = run.job, run.loop, run.world, run.scaler
    count, asked = distributed.total(
        world, sum(job.count(part) for part in parts if part is not None), float(wish.signal is not None)
    )
    if asked:
        return None
    divisor = job.divisor(count)
    for group in job.optimizer.param_groups:
        group["lr"] = job.schedule(run.progress.step, group["base_lr"])
    job.optimizer.zero_grad(set_to_none=run.recorded is None)  # a graph adds to the memory it was recorded with
    losses: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part is None and loop.parallel == "ddp":  # this rank has a sample less than others
            continue
        sharding.exchange(model, last)
        batch = to_device(parts[-1] if part is None else part, world.device)
        with _exchange(model, last):
            # DDP and FSDP take the mean over ranks; sharded, a rank with nothing to do takes part for the others' sake
            weight = world.size if part is not None else 0
            shares = run.recorded(batch, divisor) if run.recorded else share(run, model, batch, divisor, weight)
        for name, value in shares.items() if part is not None else ():
            losses[name] = losses[name] + value if name in losses else value
    if run.recorded:
        distributed.add_up(world, [p.grad for p in _trained(job) if p.grad is not None])
    scaler.unscale_(job.optimizer)
    norm = sharding.clipped(_trained(job), loop.clip, world)
    if run.saver:
        run.saver.before_step()  # weights change now: the copy of the last save must be made
    scaler.step(job.optimizer)
    scaler.update()
    if job.ema is not None:
        job.ema.update(job.model)
    return Update(losses, norm, count)


def share(run: _Run, model: nn.Module, batch: Any, divisor: Any, weight: float) -> dict[str, Tensor]:
    """Forward and backward of a micro-batch: its gradients times `weight` are added, its share of each loss comes back."""
    with autocast(run.loop, run.world):
        shares = run.job.loss(model, batch, divisor)
    run.scaler.scale(shares["loss"] * weight).backward()
    return {name: value.detach() for name, value in shares.items()}


def autocast(loop: Loop, world: World) -> contextlib.AbstractContextManager[Any]:
    """The run's precision for a forward."""
    if loop.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(world.device.type, dtype=DTYPES[loop.precision])


def _exchange(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP exchanges gradients in the last backward of an update only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


# -- start ------------------------------------------------------------------------------------------------------------


def _possible(loop: Loop, world: World, say: Output) -> Loop:
    """The loop, without what cannot be had here and changes no number by more than rounding."""
    if loop.graph and loop.precision == "fp16":
        hint = "precision: bf16, or graph: false"
        raise TensorkeepError("a CUDA graph would hold on to fp16's scale", where="training.graph", hint=hint)
    if not loop.graph or (world.device.type == "cuda" and (world.size == 1 or loop.parallel == "ddp")):
        return loop
    if world.first:
        say.remark("note: a CUDA graph needs a GPU, and no shards; here every kernel is launched by itself")
    return replace(loop, graph=False)


def _trained(job: Job) -> list[Tensor]:
    return [p for group in job.optimizer.param_groups for p in group["params"]]


def _set_out(job: Job, loop: Loop, world: World) -> None:
    """Refuse what cannot be meant, then make the job's objects ready: base rates, seeds, mode, shards, compile."""
    if loop.updates < 0 or loop.batch < 1 or (loop.micro is not None and loop.micro < 1):
        what = f"updates {loop.updates}, batch {loop.batch}, micro {loop.micro}: all must be positive"
        raise TensorkeepError(what, where="training")
    if (loop.best or loop.patience is not None) and job.evaluate is None:
        raise TensorkeepError("a best value or patience needs evaluations, and the job has none", where="training.best")
    if loop.patience is not None and not loop.best:
        raise TensorkeepError("patience needs the number that is to get better", where="training.best")
    for group in job.optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
    randomness.seed_process(loop.seed, world.rank)
    job.model.train()
    if loop.parallel == "fsdp" and world.size > 1:
        units = (job.shard or sharding.blocks)(job.model)
        sharding.shard(job.model, job.optimizer, {} if job.ema is None else job.ema.tensors, units, world)
    if loop.compile:
        job.model.compile()  # in place: names stay


def _start(run: _Run, resume: str | Path | State, allow: tuple[str, ...]) -> None:
    """Put back what there is to go on from, and make the run folder agree with it."""
    job, loop, world = run.job, run.loop, run.world
    say = run.say if world.first else Output(quiet=True)
    found = resuming.find(run.folder, resume, world)
    for finding in found.skipped:
        say.remark(f"skipped: {finding.code} {finding.message}")
    if found.state is not None:
        state = found.state
        distributed.together(world, lambda: resuming.compare(job, loop, state, run.data, allow))
        run.level, why = resuming.put_back(job, loop, world, state, run.scaler, adopt=found.place is not None)
        evaluations = [dict(e) for e in state.document.get("evaluations", [])]
        run.progress = Progress(state.document["step"], state.document["samples"], evaluations)
        remark = f"resumed from {found.name} at step {run.progress.step}, {run.level}"
        say.remark(remark + (f" ({', '.join(why)})" if why else ""))
    distributed.together(world, lambda: _rewind(run, say) if world.first else None)
    # evaluations of the step itself came after its checkpoint; the rows of the first rank hold for all
    rows = list(metrics.rows(run.folder / metrics.METRICS)) if world.first else []
    known = {e["step"] for e in run.progress.evaluations}
    late = [
        {"step": r["step"], **r["evaluation"]}
        for r in rows
        if r["step"] not in known and isinstance(r.get("evaluation"), dict)
    ]
    run.progress.evaluations += distributed.gathered(world, late)[0]
    if run.saver:
        _mark_best(run)  # a kill may have come between an evaluation's row and the mark


def _rewind(run: _Run, say: Output) -> None:
    gone = metrics.rewind(run.folder / metrics.METRICS, run.progress.step)
    if gone:
        say.remark(f"{gone} rows after step {run.progress.step} are made again")
    text = yaml.safe_dump(run.job.recipe, sort_keys=False, allow_unicode=True).encode() if run.job.recipe else b""
    path = run.folder / RECIPE
    if text and not (path.exists() and path.read_bytes() == text):
        with replacing(path, overwrite=True) as temporary:
            write_bytes(temporary, text)


@contextlib.contextmanager
def _saving(run: Path, loop: Loop, world: World) -> Iterator[Saver | None]:
    """The first rank's saver, and with it the run's lock; closed at the end, also after an error."""
    saver = distributed.together(world, lambda: Saver(run, loop.keep, loop.background) if world.first else None)
    try:
        yield saver
    finally:
        if saver:
            saver.close()


# -- between updates --------------------------------------------------------------------------------------------------


def _save(run: _Run) -> None:
    state = resuming.snapshot(
        run.job,
        run.loop,
        run.world,
        run.progress.step,
        run.progress.samples,
        run.scaler,
        run.progress.evaluations,
        run.data,
    )
    if run.saver:
        metrics.sync(run.folder / metrics.METRICS)
        run.saver.save(state)


def _evaluation_due(run: _Run) -> bool:
    """Whether this step is to be evaluated and no row says that it was."""
    loop, step = run.loop, run.progress.step
    asked = due(step, loop.evaluate_every) and step >= loop.evaluate_from
    if run.job.evaluate is None or step == 0 or not (asked or step == loop.updates):
        return False
    return not any(e["step"] == step for e in run.progress.evaluations)


def _evaluate_if_due(run: _Run, log: Log, wish: Wish) -> None:
    """Evaluate after this step; note the row, and the best checkpoint. Every rank goes by the first one's numbers."""
    if not _evaluation_due(run):
        return
    found = {name: float(value) for name, value in evaluated(run.job, run.world, wish).items()}
    numbers: dict[str, Any] = metrics.finite(distributed.gathered(run.world, found)[0])
    name = (run.loop.best or "").removeprefix("-")
    if name and name not in numbers:
        raise TensorkeepError(
            f"there is no {name!r} among what is evaluated",
            where="training.best",
            hint=f"one of {', '.join(sorted(numbers))}; with a minus where smaller is better",
        )
    step = run.progress.step
    run.progress.evaluations.append({"step": step, **numbers})
    if run.saver:
        log.write({"step": step, "samples": run.progress.samples, "evaluation": numbers}, durable=True)
        run.say.remark(
            f"step {step}: " + ", ".join(f"{k} {'none' if v is None else f'{v:.4g}'}" for k, v in numbers.items())
        )
        _mark_best(run)


def evaluated(job: Job, world: World, wish: Wish) -> Mapping[str, float]:
    """What `job.evaluate` gives under the average. Nothing of the run changes: mode and random states come back.

    One process may be interrupted in it; of several, one alone must not leave the others waiting.
    """
    assert job.evaluate is not None
    before, training = randomness.capture(), job.model.training
    try:
        with job.ema.applied(job.model) if job.ema else contextlib.nullcontext(), torch.no_grad():
            job.model.eval()
            with wish.may_stop() if world.size == 1 else contextlib.nullcontext():
                return job.evaluate(job.model)
    finally:
        sharding.forget_whole(job.model)
        job.model.train(training)
        randomness.restore(before)


def best_step(loop: Loop, evaluations: list[dict[str, Any]]) -> int | None:
    """The step of the best evaluation; the first of equals.

    >>> best_step(Loop(updates=9, batch=1, best="-loss"), [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.5}])
    3
    """
    name = (loop.best or "").removeprefix("-")
    sign = -1.0 if (loop.best or "").startswith("-") else 1.0
    there = [e for e in evaluations if isinstance(e.get(name), float)]
    return max(there, key=lambda e: sign * e[name])["step"] if there else None


def _mark_best(run: _Run) -> None:
    """Let `best` name the best step, where its checkpoint is there and another is named."""
    assert run.saver is not None
    step = best_step(run.loop, run.progress.evaluations) if run.loop.best else None
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
