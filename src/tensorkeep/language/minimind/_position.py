"""Translate MiniMind's epochs and micro-batches into samples and updates, and its learning rate into a schedule.

MiniMind counts micro-batches of one rank in one epoch. What that means depends on the data's length, the size of a
micro-batch, the ranks and how many micro-batches make an optimizer step (the accumulation). Its files hold none of
these; the accumulation follows from the steps that Adam counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError


class Batching(NamedTuple):
    """How MiniMind cut its data into micro-batches and optimizer steps.

    Args:
        length: samples of the data.
        batch: samples of a micro-batch on one rank.
        accumulation: micro-batches of an optimizer step.
        world_size: ranks.
        early: the step came at `(step + 1) % accumulation == 0`, as it did before 2026.
    """

    length: int
    batch: int
    accumulation: int = 1
    world_size: int = 1
    early: bool = False

    @property
    def iterations(self) -> int:
        """Micro-batches of one rank in an epoch; the last may be smaller, and DistributedSampler pads the ranks."""
        return math.ceil(math.ceil(self.length / self.world_size) / self.batch)

    @property
    def update(self) -> int:
        """Samples of an optimizer step, over all ranks."""
        return self.batch * self.world_size * self.accumulation

    def stepped(self, step: int) -> tuple[int, int]:
        """Count the optimizer steps in an epoch by micro-batch `step`, and the micro-batches they took.

        >>> Batching(200, 4, 2).stepped(49), Batching(200, 4, 2, early=True).stepped(49)
        ((24, 48), (25, 49))
        """
        early = self.early and self.accumulation > 1
        steps = (step + early) // self.accumulation
        return steps, max(steps * self.accumulation - early, 0)


class Position(NamedTuple):
    """Where a run stood, in samples.

    Args:
        samples: consumed by optimizer steps, over all ranks and epochs.
        again: trained on since, but their gradients were lost with the process, so they come again.
    """

    samples: int
    again: int


def position(epoch: int, step: int, batching: Batching) -> Position:
    """Translate MiniMind's (epoch, step) into samples: those of the last optimizer step, whose weights are saved.

    The gradients of the micro-batches since then were not kept; the step after the epoch's last micro-batch comes after
    the last save.

    Args:
        epoch: from 0.
        step: micro-batches of one rank in this epoch.
        batching: how the data was cut.

    Raises:
        TensorkeepError: the epoch has no such step (R02).

    >>> position(1, 20, Batching(200, 4, 2)), position(0, 49, Batching(200, 4, 2))
    (Position(samples=280, again=0), Position(samples=192, again=4))
    """
    if min(batching[:4]) < 1 or epoch < 0 or step < 0:
        raise TensorkeepError(f"epoch {epoch}, step {step}, {batching}: that is no position", where="resume")
    if step > batching.iterations:
        cut = f"{batching.length} samples, {batching.world_size} ranks, micro-batches of {batching.batch}"
        raise TensorkeepError(
            f"step {step} of an epoch that has {batching.iterations} ({cut})",
            where="resume",
            code="R02",
            hint="give the data and batch size that this file was trained with",
        )
    wide = batching.batch * batching.world_size
    here, seen = min(batching.stepped(step)[1] * wide, batching.length), min(step * wide, batching.length)
    return Position(epoch * batching.length + here, seen - here)


def step_of(samples: int, batching: Batching) -> tuple[int, int, int]:
    """Translate a position in samples into MiniMind's (epoch, step), and the samples beyond it that these cannot say.

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
    """Find the accumulations that make as many optimizer steps by (epoch, step) as Adam counted.

    An epoch ends with an optimizer step of the micro-batches that are left.

    Args:
        length: samples of the data.
        batch: samples of a micro-batch on one rank.
        world_size: ranks.
        epoch: from 0.
        step: micro-batches of one rank in this epoch.
        updates: optimizer steps that Adam counted.
        accumulation: the only one to try (None: all).
        old: the file may be from before 2026; where today's rules fit nothing, epochs without that last step are
            tried, then steps that came a micro-batch early.

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
    """Compute MiniMind's learning rate at micro-batch `done` of `total`: a cosine from `rate` down to a tenth of it.

    `rate (0.1 + 0.45 (1 + cos(pi done / total)))`, as `get_lr` of its trainers has it.

    >>> learning_rate(1.0, 0, 100), round(learning_rate(1.0, 100, 100), 6)
    (1.0, 0.1)
    """
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done / total)))


def first_rate(now: float, epoch: int, step: int, epochs: int, batching: Batching) -> float | None:
    """Compute the rate a run began with from the one in its file, which was set at its last micro-batch.

    None where the run cannot have been planned for so many `epochs`.

    >>> round(first_rate(0.0005709932729367744, 1, 20, epochs=2, batching=Batching(200, 4)), 9)
    0.002
    """
    done, total = epoch * batching.iterations + step, epochs * batching.iterations
    return now / learning_rate(1.0, done, total) if 0 < done <= total else None
