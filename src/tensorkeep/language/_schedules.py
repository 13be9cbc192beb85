"""Learning rates as functions of the update: no state, so nothing to save or to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tensorkeep.errors import TensorkeepError


@dataclass(frozen=True)
class ScheduleConfig:
    """`warmup` updates from 0 to the rate (a share of all where below 1); then, to the end of the run:

    cosine: down to `final` times the rate. constant: the rate. wsd: the rate, and over the last `decay` updates (a
    share where below 1) in a straight line down to `final` times it (warmup-stable-decay, arXiv 2404.06395).
    minimind: `lr (0.1 + 0.45 (1 + cos(pi t / T)))`, t counted from 1, without warm-up, as its trainers have it.
    """

    kind: Literal["cosine", "constant", "wsd", "minimind"] = "cosine"
    warmup: float = 0.0
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.decay < 0 or not 0 <= self.final <= 1:
            what = f"warmup {self.warmup} and decay {self.decay} are not negative, final {self.final} lies in [0, 1]"
            raise TensorkeepError(what, where="schedule")
        if self.kind == "minimind" and self.warmup:
            raise TensorkeepError("minimind's schedule has no warm-up", where="schedule.warmup", hint="kind: cosine")


@dataclass(frozen=True)
class Schedule:
    """A schedule over `updates` in all: `schedule(update, base)` is the rate of update 0, 1, ...

    >>> rate = Schedule(ScheduleConfig("cosine", warmup=2, final=0.0), 6)
    >>> [round(rate(update, 1.0), 3) for update in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """

    config: ScheduleConfig
    updates: int

    def __post_init__(self) -> None:
        if (
            self._count(self.config.warmup) + (self._count(self.config.decay) if self.config.kind == "wsd" else 0)
            > self.updates
        ):
            raise TensorkeepError(
                f"warm-up and decay are longer than the run of {self.updates} updates",
                where="schedule",
                hint="numbers below 1 are shares of the run",
            )

    def _count(self, value: float) -> int:
        return round(value * self.updates) if value < 1 else int(value)

    def __call__(self, update: int, base: float) -> float:
        config, warmup = self.config, self._count(self.config.warmup)
        if config.kind == "minimind":
            return base * (0.1 + 0.45 * (1 + math.cos(math.pi * (update + 1) / self.updates)))
        if update < warmup:
            return base * (update + 1) / warmup
        if config.kind == "constant":
            return base
        if config.kind == "wsd":
            decay = self._count(config.decay)
            left = (self.updates - update) / decay if decay else 1.0
            return base * (config.final + (1 - config.final) * min(1.0, left))
        progress = (update - warmup) / max(self.updates - warmup, 1)
        return base * (config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2)
