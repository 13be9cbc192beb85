"""Where a MiniMind run stood, in samples: its epochs, micro-batches and optimizer steps, and its learning rate.

MiniMind counts micro-batches of one rank in one epoch. What that means depends on the data's length, the micro-batch,
the ranks and the accumulation, none of which its files hold; Adam's own counter tells the accumulation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError


class Batching(NamedTuple):
    """How MiniMind cut its data: `length` samples, `batch` a micro-batch on one of `world_size` ranks, `accumulation`
    micro-batches an optimizer step. `early`: the step came at `(step + 1) % accumulation == 0`, as it did before 2026."""

    length: int
    batch: int
    accumulation: int = 1
    world_size: int = 1
    early: bool = False

    @property
    def iterations(self) -> int:
        """Micro-batches of a rank in an epoch; the last may be smaller, and DistributedSampler pads the ranks."""
        return math.ceil(math.ceil(self.length / self.world_size) / self.batch)

    @property
    def update(self) -> int:
        """Samples an optimizer step, over all ranks."""
        return self.batch * self.world_size * self.accumulation

    def stepped(self, step: int) -> tuple[int, int]:
        """Optimizer steps in an epoch by micro-batch `step`, and the micro-batches they took.

        >>> Batching(200, 4, 2).stepped(49), Batching(200, 4, 2, early=True).stepped(49)
        ((24, 48), (25, 49))
        """
        early = self.early and self.accumulation > 1
        steps = (step + early) // self.accumulation
        return steps, max(steps * self.accumulation - early, 0)


class Position(NamedTuple):
    """`samples` consumed by optimizer steps, over all ranks and epochs; `again`: trained on since, but their gradients
    were lost with the process, so they come again."""

    samples: int
    again: int


def position(epoch: int, step: int, batching: Batching) -> Position:
    """The position of MiniMind's (epoch, step) in samples: that of the last optimizer step, whose weights are saved.

    Micro-batches since then have gradients that nobody kept; the step after the epoch's last micro-batch comes after
    the last save. Raises TensorkeepError for a step that the epoch does not have.

    >>> position(1, 20, Batching(200, 4, 2)), position(0, 49, Batching(200, 4, 2))
    (Position(samples=280, again=0), Position(samples=192, again=4))
    """
    if min(batching[:4]) < 1 or epoch < 0 or step < 0:
        raise TensorkeepError(f"epoch {epoch}, step {step}, {batching}: that is no position", where="resume")
    if step > batching.iterations:
        raise TensorkeepError(
            f"step {step} of an epoch that has {batching.iterations} ({batching.length} samples, {batching.world_size} ranks, "
            f"micro-batches of {batching.batch})",
            where="resume",
            code="R02",
            hint="give the data and batch size that this file was trained with",
        )
    wide = batching.batch * batching.world_size
    here, seen = min(batching.stepped(step)[1] * wide, batching.length), min(step * wide, batching.length)
    return Position(epoch * batching.length + here, seen - here)


def step_of(samples: int, batching: Batching) -> tuple[int, int, int]:
    """MiniMind's (epoch, step) of a position in samples, and the samples beyond it that (epoch, step) cannot say.

    >>> step_of(283, Batching(200, 4, 2))
    (1, 20, 3)
    """
    epoch, within = divmod(samples, batching.length)
    step, rest = divmod(within, batching.batch * batching.world_size)
    return epoch, step, rest


def batchings(
    length: int,
    batch: int,
    world_size: int,
    epoch: int,
    step: int,
    updates: int,
    accumulation: int | None = None,
    old: bool = False,
) -> list[Batching]:
    """The ways to accumulate that make as many optimizer steps by (epoch, step) as Adam counted, `accumulation` or any.

    An epoch ends with a step of what is left. `old`: the file may be of before 2026; where today's rules fit nothing,
    epochs without that last step, then steps that came early, are tried.

    >>> [b.accumulation for b in batchings(200, 4, world_size=1, epoch=1, step=20, updates=35)]
    [2]
    """
    whole = Batching(length, batch, 1, world_size).iterations
    for early, last in ((False, True), *(((False, False), (True, True), (True, False)) if old else ())):
        found = []
        for every in (accumulation,) if accumulation else range(1, whole + 1):
            one = Batching(length, batch, every, world_size, early)
            (steps, took), now = one.stepped(whole), one.stepped(step)[0]
            if updates == epoch * (steps + (last and took < whole)) + now:
                found.append(one)
        if found:
            return found
    return []


def learning_rate(rate: float, done: int, total: int) -> float:
    """MiniMind's rate at micro-batch `done` (from 1) of `total`: a cosine from 1 down to 0.1 of `rate`.

    >>> learning_rate(1.0, 0, 100), round(learning_rate(1.0, 100, 100), 6)
    (1.0, 0.1)
    """
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done / total)))


def first_rate(now: float, epoch: int, step: int, epochs: int, batching: Batching) -> float | None:
    """The rate a run began with, from the one in its file, which was set at its last micro-batch.

    None where `epochs` cannot be the run's length.

    >>> round(first_rate(0.0005709932729367744, 1, 20, epochs=2, batching=Batching(200, 4)), 9)
    0.002
    """
    done, total = epoch * batching.iterations + step, epochs * batching.iterations
    return now / learning_rate(1.0, done, total) if 0 < done <= total else None
