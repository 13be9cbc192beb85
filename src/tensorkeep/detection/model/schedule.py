"""Learning rates as a function of how many updates were made: no state, so nothing to save or to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from tensorkeep.errors import TensorkeepError


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine that would end at `epochs`; training stops at `stop_epoch` (None: `epochs`)."""

    warmup_epochs: int = 5
    epochs: int = 100
    stop_epoch: int | None = None
    floor: float = 1e-8

    @property
    def epochs_run(self) -> int:
        """How many epochs are trained."""
        return self.epochs if self.stop_epoch is None else self.stop_epoch


def learning_rate(update: int, base: float, warmup: int, total: int, floor: float = 1e-8, start: float = 0.0) -> float:
    """Learning rate of update `update` (0-based); `warmup` and `total` count updates.

    `update < warmup`: from `start` in equal steps, reaching `base` at `warmup - 1`. Then
    `floor + (base - floor) (1 + cos(pi (update - warmup) / (total - warmup))) / 2`, which is OpenTAD's chained form
    in closed form. Past `total` the cosine rises again, as there. Raises TensorkeepError for `total <= warmup`.

    >>> [round(learning_rate(k, 1.0, 3, 7), 3) for k in range(8)]
    [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= warmup < total:
        what = f"warm-up of {warmup} updates does not fit into {total}"
        raise TensorkeepError(what, where="schedule", hint="warmup_epochs must be smaller than epochs")
    if update < warmup:
        return start if warmup == 1 else start + update * (base - start) / (warmup - 1)
    return floor + (base - floor) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def set_learning_rates(
    optimizer: Optimizer, config: ScheduleConfig, update: int, updates_per_epoch: int
) -> list[float]:
    """Set every group's `lr` for this update from its `base_lr`; returns them in the order of the groups."""
    warmup, total = config.warmup_epochs * updates_per_epoch, config.epochs * updates_per_epoch
    rates = [learning_rate(update, g["base_lr"], warmup, total, config.floor) for g in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    return rates
