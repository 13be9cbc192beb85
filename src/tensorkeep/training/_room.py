"""Before the first step: is there room on the disk for what the run is going to save?

The sizes are those of the files that a save will write, laid out from the tensors of this very run. Moments that an
optimizer makes in its first step are found by letting a twin of it step over tensors without memory.
"""

from __future__ import annotations

import copy
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from tensorkeep.errors import FOREIGN, TensorkeepError
from tensorkeep.output import size as spelled
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import explained
from tensorkeep.training._retention import Keep
from tensorkeep.training._run import Run
from tensorkeep.training.distributed import gathered, together
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.live_state import optimizer_state, stored_tensors
from tensorkeep.training.saver import State

_AHEAD = 4  # saves after which as many checkpoints are there as ever will be, beside those that `keep` names


def check(run: Run) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, before anything is trained; every rank must call it.

    What must fit is the first save, and as many checkpoints as stay at a time, with the next one being written. What
    `keep_every` keeps for ever is a remark: it may be moved away meanwhile.

    Args:
        run: resumed or new, at its first step.

    Raises:
        TensorkeepError: on every rank: names the host, its folder, the bytes that are needed and free, and what to do.
    """
    saves = coming(run.loop, run.step, run.job.evaluate is not None)
    if not saves:
        return
    state, known = together(run.world, lambda: foreseen(run.job, run.step))
    sizes = run.saver.sizes(state) if run.saver is not None else []
    own = together(run.world, lambda: _seen(run.folder, sizes, run.saver is not None))
    hosts = [place for place in gathered(run.world, own) if place is not None]
    failed = next((why for place in hosts if (why := refusal(place, saves, run.loop)) is not None), None)
    if failed is not None:
        raise failed
    if run.world.first:
        if not known:
            run.say.remark("note: what the optimizer will keep is not known before its first step, nor its room")
        for line in growth(hosts[0], saves, run.loop.keep):
            run.say.remark(line)


class Place(NamedTuple):
    """A run's folder as one host sees it.

    Attributes:
        host: its name.
        folder: the run's folder.
        free: bytes that are left on its file system.
        needed: bytes of one checkpoint, of what this host keeps of it.
        there: bytes of the checkpoints that are there, by step.
    """

    host: str
    folder: str
    free: int
    needed: int
    there: dict[int, int]


def _seen(folder: Path, sizes: Sequence[int], saves: bool) -> Place | None:
    """Look at the folder of a rank that saves; None for others."""
    if not saves:
        return None
    with explained(folder):
        there = {
            step: sum(p.stat().st_size for p in run_folder.folder_of(folder, step).iterdir() if p.is_file())
            for step in run_folder.steps(folder)
        }
        return Place(socket.gethostname(), str(folder), run_folder.free_bytes(folder), sum(sizes), there)


def coming(loop: Loop, step: int, evaluates: bool) -> list[int]:
    """List the steps that are still to be saved, in order.

    Args:
        loop: says when.
        step: updates made.
        evaluates: whether the job has an evaluation, before which a checkpoint is made.

    Example:
        >>> coming(Loop(updates=10, batch=1, save_every=4), 4, False)
        [8, 10]
    """
    found = {loop.updates}
    if loop.save_every is not None:
        found |= set(range(loop.save_every, loop.updates + 1, loop.save_every))
    if evaluates and loop.evaluate_every is not None:
        steps = range(loop.evaluate_every, loop.updates + 1, loop.evaluate_every)
        found |= {s for s in steps if s >= loop.evaluate_from}
    return sorted(s for s in found if s > step)


def peak(there: Mapping[int, int], needed: int, saves: Sequence[int], keep: Keep, best: bool) -> int:
    """Find the most bytes that checkpoints will take beyond those they take now.

    Args:
        there: bytes of the checkpoints that are there, by step.
        needed: bytes of one checkpoint.
        saves: the steps to be saved.
        keep: which checkpoints stay.
        best: whether a best one stays beside them; the first one then, as it may be.

    Example:
        >>> peak({}, 100, [1, 2, 3, 4, 5], Keep(last=2), best=False)
        300
    """
    now, held, most = sum(there.values()), dict(there), 0
    for step in saves[: keep.last + _AHEAD]:
        most = max(most, sum(held.values()) + needed - now)
        held[step] = needed
        kept = {step, saves[0]} if best else {step}
        for gone in run_folder.unwanted(list(held), keep.last, keep.every, kept):
            del held[gone]
    return most


def refusal(place: Place, saves: Sequence[int], loop: Loop) -> TensorkeepError | None:
    """Say why the checkpoints of a run do not fit; None where they do.

    Args:
        place: the folder.
        saves: the steps to be saved.
        loop: says what stays.
    """
    keep, best = loop.keep, loop.best is not None
    wanted = peak(place.there, place.needed, saves, keep, best)
    if wanted <= place.free:
        return None
    fewer = [
        n
        for n in range(keep.last - 1, 0, -1)
        if peak(place.there, place.needed, saves, Keep(n, keep.every), best) <= place.free
    ]
    hint = f"free {wanted - place.free:,} bytes, or --out on a larger disk"
    hint += f", or --training.keep_last {fewer[0]}" if fewer else ""
    most = -(-wanted // max(place.needed, 1))
    what = (
        f"too little room on {place.host}: the run's checkpoints need {wanted:,} bytes, {place.free:,} are free; "
        f"one has {place.needed:,}, {'one is' if most == 1 else f'up to {most} are'} added while it runs"
    )
    return TensorkeepError(what, where=place.folder, hint=hint)


def growth(place: Place, saves: Sequence[int], keep: Keep) -> list[str]:
    """Say what `keep_every` comes to where that does not fit.

    Args:
        place: the folder.
        saves: the steps to be saved.
        keep: which checkpoints stay.
    """
    count = sum(step % keep.every == 0 for step in saves) if keep.every else 0
    if count * place.needed <= place.free:
        return []
    return [
        f"note: keep_every {keep.every} keeps {count} checkpoints for ever, {spelled(count * place.needed)};"
        f" {spelled(place.free)} are free in {place.folder}"
    ]


# -- what a save will hold --------------------------------------------------------------------------------------------


def foreseen(job: Job, step: int) -> tuple[State, bool]:
    """Return the state that the next save will write, as far as it has sizes; moments not yet made lie on meta.

    Args:
        job: the live objects.
        step: updates made.

    Returns:
        The state, and whether what the optimizer will keep is known.
    """
    tensors, _ = stored_tensors(job.model, base=job.base is not None)
    optimizer, _ = optimizer_state(job.model, job.optimizer)
    averages: dict[str, Tensor] = {} if job.ema is None else job.ema.state_dict()
    moments = None if optimizer else _moments(job)
    known = bool(optimizer) or moments is not None
    return State(tensors, optimizer or moments or {}, averages, {"step": step}, job.base), known


def _moments(job: Job) -> dict[str, Tensor] | None:
    """Find what the optimizer will keep of each parameter, by letting its twin step over parameters without memory.

    One parameter of each size and type of a group stands for all: a step without memory costs as much as a real one.
    One that needs values for its step (Adafactor) has made room before; None where one has not.
    """
    names = {id(p): n for n, p in job.model.named_parameters()}
    found: dict[str, Tensor] = {}
    for group in job.optimizer.param_groups:
        alike = {_kind(p): p for p in group["params"]}
        hollow = {kind: _hollow(p) for kind, p in alike.items()}
        plain: dict[str, Any] = {k: False for k in ("foreach", "fused", "capturable") if k in group}
        twin: Optimizer = copy.copy(job.optimizer)
        twin.state, twin.param_groups = defaultdict(dict), [{**group, **plain, "params": [*hollow.values()]}]
        step: Any = getattr(type(twin).step, "__wrapped__", type(twin).step)  # without the hooks of all optimizers
        try:
            with torch.no_grad():
                step(twin)
        except FOREIGN:  # an optimizer that needs values for its step
            if not all(twin.state.get(one) for one in hollow.values()):
                return None
        for real in group["params"]:
            kept = twin.state.get(hollow[_kind(real)], {})
            slots = {slot: v for slot, v in kept.items() if isinstance(v, Tensor)}
            found |= {f"{names[id(real)]}/{slot}": _spread(value, real) for slot, value in slots.items()}
    return found


def _local(parameter: Any) -> Any:
    """This rank's part of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _kind(parameter: Any) -> tuple[Any, ...]:
    """What the sizes of all that an optimizer keeps of a parameter depend on."""
    local = _local(parameter)
    return tuple(local.shape), local.stride(), local.dtype


def _hollow(parameter: Any) -> Tensor:
    """A parameter with a gradient, as large as this rank's part of one, without memory."""
    local = _local(parameter)
    made = torch.nn.Parameter(torch.empty_like(local.detach(), device="meta"), parameter.is_floating_point())
    made.grad = torch.empty_like(made.detach())
    return made


def _spread(value: Tensor, parameter: Any) -> Tensor:
    """Spread what is kept of a parameter as the parameter is."""
    if not hasattr(parameter, "to_local") or value.shape != parameter.to_local().shape or not value.is_meta:
        return value
    from torch.distributed.tensor import DTensor

    how: dict[str, Any] = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    spread: Tensor = DTensor.from_local(value, parameter.device_mesh, parameter.placements, **how)
    return spread
