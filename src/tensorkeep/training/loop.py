"""The training loop: batches, updates, and between updates logging, saving and evaluating.

State is saved at update boundaries and nowhere else. A step's rows are on the disk before its checkpoint, the
checkpoint before its evaluation: a run killed anywhere goes on from its last checkpoint and says every row once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.output import Output, size
from tensorkeep.storage.placement import replacing, write_bytes
from tensorkeep.storage.run_manifest import as_finding
from tensorkeep.training import _restart as restart
from tensorkeep.training import _resume as resuming
from tensorkeep.training import _sharding as sharding
from tensorkeep.training import distributed, metrics, preflight, randomness, watchdog
from tensorkeep.training._board import introduced
from tensorkeep.training._evaluating import evaluate_if_due, evaluation_due, mark_best, stops_early
from tensorkeep.training._going_on import Found, find, forget
from tensorkeep.training._graphs import Recorded
from tensorkeep.training._logbook import Log, Update, due
from tensorkeep.training._proof import Proof
from tensorkeep.training._room import check as check_room
from tensorkeep.training._run import Run, told, trained
from tensorkeep.training._update import share, update
from tensorkeep.training.batches import Data, Positions, Stream, batches, is_flow, streamed
from tensorkeep.training.distributed import World
from tensorkeep.training.fsdp import blocks, is_sharded
from tensorkeep.training.hosts import Hosts, connected
from tensorkeep.training.interruption import Interrupted, Wish, listening
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.precision import GATHERED
from tensorkeep.training.recipe import to_yaml
from tensorkeep.training.saver import Saver, State

RECIPE = "recipe.yaml"
Reason = Literal["done", "stopped early", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        step: updates made.
        samples: samples consumed by them, over all ranks.
        reason: `done` (all updates made), `stopped early` (for lack of better evaluations) or `interrupted`.
        evaluation: the numbers of the last evaluation, {} where there was none.
        level: how exact the resume was (`exact`, `sample-exact`, ...), None where the run began anew.
    """

    step: int
    samples: int
    reason: Reason
    evaluation: dict[str, float]
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
    """Train a job in a run's folder, from its newest valid checkpoint where there is one.

    Killed at any instant and called again with the same job, it ends bitwise where it would have ended (on the same
    machine, with as many ranks).

    Args:
        job: what trains, on what; its model must lie on `world.device`.
        run: the run's folder; checkpoints, `metrics.jsonl` and `recipe.yaml` go there.
        loop: how long, in what portions, and when to save and evaluate.
        resume: `auto` goes on from the newest valid checkpoint; `never` refuses a folder that has one; a step folder,
            another run or a `State` is what a new run begins from.
        world: this process among its peers (None: the only one, on the CPU).
        allow: fields of the recipe, as patterns, that may differ from those of the checkpoint.
        say: where remarks and the status line go (None: nowhere).

    Returns:
        How the run ended.

    Raises:
        TensorkeepError: the job is not the one that was saved (R04), a loss is not finite (V01), or a save fails;
            checkpoints that are there stay.

    Example:
        >>> outcome = fit(job, "runs/one", Loop(updates=1000, batch=32))              # doctest: +SKIP
    """
    folder, world, say = Path(run), world or World(), say or Output(quiet=True)
    with watchdog.watching(folder, world.rank, world.size, loop.watchdog, say.json):
        watchdog.at("start", busy=True)
        return _fit(job, folder, loop, resume, world, allow, say)


def _fit(
    job: Job, folder: Path, loop: Loop, resume: str | Path | State, world: World, allow: tuple[str, ...], say: Output
) -> Outcome:
    """Do what `fit` does, once somebody watches."""
    scaler = torch.amp.GradScaler(world.device.type, enabled=loop.precision == "fp16")
    loop = _possible(job, loop, world, say)
    if world.size > 1:
        introduced(world.rank)
    hosts = connected(preflight.folders(folder, world, loop.checkpoint), loop.checkpoint.replicas)
    _set_out(job, loop, world)
    # once the lock is held nobody else writes into the run
    with randomness.deterministic(loop.deterministic), _saving(folder, loop, world, hosts) as saver:
        under_way = Run(job, folder, loop, world, say, scaler, saver, resuming.data_facts(job), hosts)
        facts = {"recipe": job.recipe, "data": under_way.data, "base": (job.base or {}).get("digest")}
        for line in preflight.agree(facts, world):
            say.remark(line)
        _start(under_way, resume, allow)
        check_room(under_way)
        alone = loop.graph or loop.parallel == "fsdp"
        model = job.model if alone else distributed.parallel(job.model, world, loop.deterministic)
        if loop.graph:  # it knows nothing of DDP's hooks: `update` adds up the ranks' gradients
            distributed.same_start(world, trained(job))
            record = Recorded(lambda batch, divisor: share(under_way, model, batch, divisor, 1), trained(job))
            under_way.recorded = record
        compiling = watchdog.compiling() if loop.compile else contextlib.nullcontext()
        with told(under_way), listening() as wish, compiling:
            reason = _go(under_way, model, wish)
            with watchdog.doing("last save"):
                if saver:
                    saver.wait()
            if under_way.status:
                under_way.status.note(state=reason, step=under_way.step, doing=None)
    last = under_way.evaluations[-1] if under_way.evaluations else {}
    numbers = {k: v for k, v in last.items() if k != "step"}
    return Outcome(under_way.step, under_way.samples, reason, numbers, under_way.level)


def _go(run: Run, model: nn.Module, wish: Wish) -> Reason:
    """Make updates until the run is done, stops early or is interrupted."""
    job, loop, world = run.job, run.loop, run.world
    saved = run.step  # the newest step with a checkpoint; none is made of a run that has not begun
    resumed, say = saved if run.level else None, run.say if world.first else None
    log = Log(run.folder, job, loop, world, run.scaler, run.say, run.status, run.saver)
    proof = Proof(run.folder, resuming.facts(loop, world, job.decoder), resumed, say, log.proven)
    parts = _batches(run)
    try:
        while True:
            evaluate_if_due(run, log, wish)  # first of all the one that a kill kept from happening
            if run.step >= loop.updates:
                return "done"
            if stops_early(loop, run.evaluations):
                return "stopped early"
            made = None if world.size == 1 and wish.signal else _updated(run, model, parts, wish)
            if made is None:
                if run.step > saved:
                    _save(run)
                return "interrupted"
            run.step, run.samples = run.step + 1, run.samples + loop.batch
            proof.note(run.step, made.losses["loss"], world)
            log.note(run.step, run.samples, made)
            if due(run.step, loop.save_every) or run.step == loop.updates or evaluation_due(run):
                _save(run)
                saved = run.step
                proof.saved(saved)
    except Interrupted:
        return "interrupted"
    finally:
        parts.close()
        proof.close()
        log.close()


def _updated(run: Run, model: nn.Module, parts: Iterator[list[Any]], wish: Wish) -> Update | None:
    """Fetch an update's micro-batches and make it, saying which of the two this process is at."""
    watchdog.at("data of update", run.step + 1, busy=True)
    fetched = next(parts)
    watchdog.at("update", run.step + 1, busy=run.world.device.type == "cpu")
    return update(run, model, fetched, wish)


def _batches(run: Run) -> Generator[list[Any], None, None]:
    """The micro-batches of each update that is left."""
    job, loop, world = run.job, run.loop, run.world
    micro, left = loop.micro or math.ceil(loop.batch / world.size), loop.updates - run.step
    if is_flow(job.data):
        places = Positions(run.samples, left, loop.batch, world.rank, world.size)
        return streamed(job.data, job.collate, places, micro, loop.workers)
    stream = Stream(loop.seed, len(job.data), job.orders)
    found = batches(
        cast("Data", job.data),
        job.collate,
        stream,
        start=run.samples,
        updates=left,
        batch=loop.batch,
        micro=micro,
        rank=world.rank,
        world=world.size,
        workers=loop.workers,
        pin=world.device.type == "cuda",
    )
    return cast("Generator[list[Any], None, None]", found) if job.ahead is None else job.ahead(found)


def _save(run: Run) -> None:
    """Save a checkpoint of this step; every rank takes part, and writes where tensors are in shards."""
    with watchdog.doing("save of step", run.step):
        state = resuming.snapshot(
            run.job, run.loop, run.world, run.step, run.samples, run.scaler, run.evaluations, run.data, run.names
        )
        if run.saver:
            rows = partial(metrics.sync, run.folder / metrics.METRICS) if run.world.first else None
            run.saver.save(state, rows)
    if run.saver and run.world.first and (why := run.saver.refusal()):
        run.say.remark(f"note: memory for saves is not page-locked ({why}): each save holds training for its copy")


# -- start ------------------------------------------------------------------------------------------------------------


def _possible(job: Job, loop: Loop, world: World, say: Output) -> Loop:
    """Leave out of the loop's settings what cannot be had here and changes no number by more than rounding."""
    if loop.checkpoint.local and loop.parallel != "fsdp":
        hint = "training.parallel: fsdp, or checkpoint.local: false"
        raise TensorkeepError("only shards are kept by each host", where="checkpoint.local", hint=hint)
    if job.micro is not None:
        loop = replace(loop, micro=min(job.micro, loop.micro or job.micro))
    if loop.graph is None:
        return replace(loop, graph=_recordable(job, loop, world, say))
    if not loop.graph or (world.device.type == "cuda" and (world.size == 1 or loop.parallel == "ddp")):
        return loop
    if world.first:
        say.remark("note: a CUDA graph needs a GPU, and no shards; here every kernel is launched by itself")
    return replace(loop, graph=False)


def _recordable(job: Job, loop: Loop, world: World, say: Output) -> bool:
    """Decide whether steps are recorded, where that is left open; of a GPU that launches them the reason is said."""
    if world.device.type != "cuda":
        return False
    why = job.launched
    if world.size > 1:
        why = "over several processes it is for `graph: true`"
    elif loop.compile:
        why = "the model is compiled"
    if why and world.first:
        say.remark(f"note: no CUDA graph, every kernel is launched by itself: {why}")
    return not why


def _set_out(job: Job, loop: Loop, world: World) -> None:
    """Refuse settings that make no sense, then ready the job's objects: base rates, seeds, mode, shards, compile."""
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
        if not is_sharded(job.model):  # a recipe's may be, so that no rank ever held it whole
            units = (job.shard or blocks)(job.model)
            averages = {} if job.ema is None else job.ema.tensors
            gathered = GATHERED.get(loop.precision)
            sharding.shard(job.model, job.optimizer, averages, units, world, gathered, loop.replicas)
        sharding.settle(job.optimizer)
        sharding.forget_whole(job.model)
    if loop.compile:
        job.model.compile()  # in place: names stay


def _put_newest(run: Run, resume: str | Path | State, allow: tuple[str, ...]) -> tuple[Found, list[str]]:
    """Put back the newest checkpoint that is whole, and tell why the resume is not more exact.

    Of one in shards each rank reads its own, so that damage shows only now; then the one before is taken.
    """
    damaged: dict[Path, Finding] = {}
    shared = run.world.size > 1 and is_sharded(run.job.model)
    while True:
        found = find(run.folder, resume, run.world, damaged, run.hosts, shared)
        if found.state is None:
            return found, []
        try:
            run.level, why = _put(run, found, found.state, allow)
        except TensorkeepError as error:
            of_shards = found.state.shards is not None and (error.code or "").startswith("F")
            if found.place is None or str(resume) == str(found.place) or not of_shards:
                forget(found, failed=True)
                raise
            damaged[found.place] = as_finding(error, "warning")
            forget(found)
        else:
            return found._replace(fetched=forget(found)), why


def _meant(run: Run, resume: str | Path | State, say: Output) -> str | Path | State:
    """Return what to go on from, which in a start that torchrun made after a fault need not be what was asked for."""
    if times := restart.restarts():
        say.remark(f"note: torchrun has started this job's processes again, restart {times}")
    if isinstance(resume, State):
        return resume
    meant = distributed.from_first(run.world, lambda: restart.meant(run.folder, str(resume)))
    if meant != str(resume):
        say.remark(f"note: --resume {resume} was for the first start, this one goes on from the newest checkpoint")
        return meant
    return resume


def _put(run: Run, found: Found, state: State, allow: tuple[str, ...]) -> tuple[str, list[str]]:
    """Compare a checkpoint with the job and put it back."""
    allowed = distributed.together(run.world, lambda: resuming.compare(run.job, run.loop, state, run.data, allow))
    level, why = resuming.put_back(run.job, run.loop, run.world, state, run.scaler, adopt=found.place is not None)
    return level, [*why, *([f"allowed to differ: {', '.join(allowed)}"] if allowed else [])]


def _start(run: Run, resume: str | Path | State, allow: tuple[str, ...]) -> None:
    """Put back the checkpoint there is to go on from, and make the run's folder agree with it."""
    world = run.world
    say = run.say if world.first else Output(quiet=True)
    resume = _meant(run, resume, say)
    found, why = _put_newest(run, resume, allow)
    for finding in found.skipped:
        say.remark(f"skipped: {finding.code} {finding.message}")
    if found.state is not None:
        then = found.state.document
        run.step, run.samples, run.evaluations = (
            then["step"],
            then["samples"],
            [*map(dict, then.get("evaluations", []))],
        )
        remark = f"resumed from {found.name} at step {run.step}, {run.level}"
        say.remark(remark + (f" ({', '.join(why)})" if why else ""))
    elif restart.restarts():
        say.remark("no checkpoint was made before: the run begins anew")
    if found.whole is not None and found.fetched:
        say.remark(f"note: {size(found.fetched)} of {found.name} came from other hosts")
    distributed.together(world, lambda: _rewind(run, say, resume) if world.first else _rewind_elsewhere(run))
    # evaluations of the step itself came after its checkpoint; the rows of the first rank hold for all
    rows = list(metrics.rows(run.folder / metrics.METRICS)) if world.first else []
    known = {e["step"] for e in run.evaluations}
    new = [row for row in rows if row["step"] not in known and isinstance(row.get("evaluation"), dict)]
    late = [{"step": row["step"], **row["evaluation"]} for row in new]
    run.evaluations += distributed.gathered(world, late)[0]
    if world.first:
        mark_best(run)  # a kill may have come between an evaluation's row and the mark


def _rewind(run: Run, say: Output, resume: str | Path | State) -> None:
    """Take away the rows of later steps, and write the recipe where it is another."""
    if not isinstance(resume, State):
        restart.begun(run.folder, str(resume))
    text = to_yaml(run.job.recipe).encode() if run.job.recipe else b""
    path, rows = run.folder / RECIPE, run.folder / metrics.METRICS
    other = bool(text) and not (path.exists() and path.read_bytes() == text)
    if other and path.exists() and not rows.exists():  # somebody's own: every run has rows before its recipe
        what = "is no run's recipe, and training would replace it"
        raise TensorkeepError(what, where=path, hint="choose another --out, or move the file out of it")
    gone = metrics.rewind(rows, run.step)
    if gone:
        say.remark(f"{gone} rows after step {run.step} are made again")
    if other:
        with replacing(path, overwrite=True) as temporary:
            write_bytes(temporary, text)


def _rewind_elsewhere(run: Run) -> None:
    """Take away the rows of later steps on a host that was the first once, so that they never pass for newer ones."""
    rows = run.folder / metrics.METRICS
    if run.hosts is not None and run.hosts.leads and rows.exists():
        metrics.rewind(rows, run.step)


@contextlib.contextmanager
def _saving(run: Path, loop: Loop, world: World, hosts: Hosts | None) -> Iterator[Saver | None]:
    """Give the first rank its saver, which holds the run's lock, and in a sharded run every rank; closed at the end."""
    shards = world if loop.parallel == "fsdp" else None
    saver = distributed.together(
        world, lambda: Saver(run, loop.keep, loop.background, shards, hosts) if world.first or shards else None
    )
    try:
        yield saver
    finally:
        if saver:
            saver.close()
