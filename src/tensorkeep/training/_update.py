"""One update: every micro-batch forward and backward, gradients exchanged and clipped, the optimizer's step."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.training import _sharding as sharding
from tensorkeep.training import distributed, watchdog
from tensorkeep.training._logbook import Update
from tensorkeep.training._run import Run, trained
from tensorkeep.training.batches import to_device
from tensorkeep.training.interruption import Wish
from tensorkeep.training.precision import autocast


def update(run: Run, model: nn.Module, parts: list[Any], wish: Wish) -> Update | None:
    """Make one update: micro-batches, the exchange of gradients with the last, clipping, the step, the average.

    Args:
        run: the run; its weights, moments, average and learning rates change.
        model: the job's model, under DDP where that is used.
        parts: this rank's micro-batches; None for an empty one.
        wish: whether this rank was asked to stop.

    Returns:
        The update's numbers; None where a rank was asked to stop, and then nothing has changed on any of them.
    """
    job, loop, world, scaler = run.job, run.loop, run.world, run.scaler
    here = sum(job.count(part) for part in parts if part is not None)
    count, asked = distributed.total(world, here, float(wish.signal is not None))
    if asked:
        return None
    divisor = job.divisor(count)
    for group in job.optimizer.param_groups:
        group["lr"] = job.schedule(run.step, group["base_lr"])
    job.optimizer.zero_grad(set_to_none=run.recorded is None)  # a graph adds to the memory it was recorded with
    losses: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        watchdog.at("update", run.step + 1, busy=world.device.type == "cpu")  # a large model may take long there
        last = number == len(parts) - 1
        if part is None and loop.parallel == "ddp":  # this rank has a sample less than others
            continue
        sharding.exchange(model, last)
        batch = to_device(parts[-1] if part is None else part, world.device)
        batch = job.prepare(batch) if job.prepare else batch
        with _exchange(model, last):
            # DDP and FSDP take the mean over ranks; sharded, a rank with nothing to do takes part for the others' sake
            weight = world.size if part is not None else 0
            shares = run.recorded(batch, divisor) if run.recorded else share(run, model, batch, divisor, weight)
        for name, value in shares.items() if part is not None else ():
            losses[name] = losses[name] + value if name in losses else value
    if run.recorded:
        distributed.add_up(world, [p.grad for p in trained(job) if p.grad is not None])
    scaler.unscale_(job.optimizer)
    norm = sharding.clipped(trained(job), loop.clip, world)
    if run.saver:
        run.saver.before_step()  # weights change now: the copy of the last save must be made
    scaler.step(job.optimizer)
    scaler.update()
    if job.ema is not None:
        job.ema.update(job.model)
    return Update(losses, norm, count)


def share(run: Run, model: nn.Module, batch: Any, divisor: Any, weight: float) -> dict[str, Tensor]:
    """Run forward and backward of a micro-batch; its gradients, times `weight`, are added to what is there.

    Returns:
        The micro-batch's share of each named loss, still on the device.
    """
    with autocast(run.loop, run.world):
        shares = run.job.loss(model, batch, divisor)
    run.scaler.scale(shares["loss"] * weight).backward()
    return {name: value.detach() for name, value in shares.items()}


def _exchange(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Within it DDP exchanges gradients if this is the `last` backward of an update, and not otherwise."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
