"""Learning rates as functions of the update: no state, so nothing to save or to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tensorkeep.errors import TensorkeepError
from tensorkeep.training.sections import ScheduleConfig, TrainingConfig, updates_of


@dataclass(frozen=True)
class Schedule:
    """A schedule that ends after `total` updates: `schedule(update, base)` is the rate of update 0, 1, ...

    `per_epoch`: updates an epoch, a fraction where an epoch does not end with an update.

    >>> rate = Schedule(ScheduleConfig("cosine", warmup=2, final=0.0), 6)
    >>> [round(rate(update, 1.0), 3) for update in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    config: ScheduleConfig
    total: int
    per_epoch: float = 1.0

    def __post_init__(self) -> None:
        decay = self._count(self.config.decay) if self.config.kind == "wsd" else 0
        if self.config.kind != "opentad" and self.warmup + decay > self.total:
            what = f"warm-up and decay are longer than the run of {self.total} updates"
            raise TensorkeepError(what, where="schedule", hint="numbers below 1 are shares")

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return self._count(self.config.warmup)

    def _count(self, value: float) -> int:
        if value < 1:
            return round(value * self.total)
        return round(value * self.per_epoch) if self.config.unit == "epochs" else int(value)

    def __call__(self, update: int, base: float) -> float:
        """Return the learning rate of an update, from 0, for a group of this base rate."""
        config, warmup = self.config, self.warmup
        if config.kind == "opentad":
            total = max(self.total, 1)
            return learning_rate(update, base, min(warmup, total - 1), total, config.floor)
        if config.kind == "minimind":
            return base * (0.1 + 0.45 * (1 + math.cos(math.pi * (update + 1) / self.total)))
        if update < warmup:
            return base * (update + 1) / warmup
        if config.kind == "constant":
            return base
        if config.kind == "wsd":
            decay = self._count(config.decay)
            left = (self.total - update) / decay if decay else 1.0
            return base * (config.final + (1 - config.final) * min(1.0, max(left, 0.0)))
        progress = min((update - warmup) / max(self.total - warmup, 1), 1.0)
        return base * (config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2)


def schedule_of(config: ScheduleConfig, training: TrainingConfig, samples: int) -> Schedule:
    """Make the schedule of a run.

    Args:
        config: The recipe's section `schedule`.
        training: Its section `training`: how long the run is, and its batch.
        samples: Samples of one epoch.

    Returns:
        A function of (update, base rate) that gives the rate.

    Raises:
        TensorkeepError: Where warm-up and decay are longer than the schedule.
    """
    per_epoch = samples / training.batch_size
    if config.ends_at is not None:
        total = round(config.ends_at * per_epoch) if config.unit == "epochs" else int(config.ends_at)
    elif config.kind == "opentad" and training.epochs is not None:
        total = round(training.epochs * per_epoch)  # the run itself ends with the update that ends its last epoch
    else:
        total = updates_of(training, samples)
    return Schedule(config, total, per_epoch)


def learning_rate(update: int, base: float, warmup: int, total: int, floor: float = 1e-8, start: float = 0.0) -> float:
    """Return the learning rate of an update under kind `opentad`.

    `update < warmup`: from `start` in equal steps, reaching `base` at `warmup - 1`. Then
    `floor + (base - floor) (1 + cos(pi (update - warmup) / (total - warmup))) / 2`, which is OpenTAD's chained form
    in closed form. Past `total` the cosine rises again, as there.

    Args:
        update: The update, from 0.
        base: The rate after the warm-up.
        warmup: Updates of the warm-up.
        total: Updates of warm-up and cosine.
        floor: The rate at the cosine's end.
        start: The rate of update 0.

    Raises:
        TensorkeepError: For `total <= warmup`.

    >>> [round(learning_rate(k, 1.0, 3, 7), 3) for k in range(8)]
    [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= warmup < total:
        what = f"warm-up of {warmup} updates does not fit into {total}"
        raise TensorkeepError(what, where="schedule", hint="warmup must be smaller than ends_at")
    if update < warmup:
        return start if warmup == 1 else start + update * (base - start) / (warmup - 1)
    return floor + (base - floor) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2
