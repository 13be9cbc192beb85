"""Read the rows of a run once, in bounded memory: every series as blocks of steps, each with least, mean and greatest.

A run of a million rows becomes some hundred blocks for each number that its rows hold; where there are more steps than
blocks, neighbours are joined. No spike is lost: the least and the greatest value of a block are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorkeep.output import is_share
from tensorkeep.training import metrics

BLOCKS = 600  # of a series at most
_NAMES = 64  # numbers of a row that are followed; further ones are counted
_LAST = 20  # evaluations that are kept whole
_KNOWN = ("step", "samples", "seconds", "count")
_MOST_STEP = 1 << 53  # a step that a double still tells apart


@dataclass
class Block:
    """What a series has between two steps.

    Attributes:
        first: the first step.
        last: the last step.
        low: the least value.
        high: the greatest value.
        total: the sum of all values.
        count: how many there are.
    """

    first: int
    last: int
    low: float
    high: float
    total: float
    count: int = 1

    @property
    def middle(self) -> float:
        """The step at which it is drawn."""
        return (self.first + self.last) / 2

    @property
    def mean(self) -> float:
        """The mean of its values."""
        return self.total / self.count

    def join(self, other: Block) -> None:
        """Take in the block that follows."""
        self.last, self.count = other.last, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total += other.total


class Series:
    """A series of any length as at most `most` blocks.

    Args:
        most: blocks to keep.

    Attributes:
        blocks: oldest first.
        best_low: step and value of the least value, None before there is one.
        best_high: the same of the greatest.
        first: the first step and value.
        last: the last step and value.
        without: how many rows name it and have no finite number, which files write as null.
        ended_without: whether the last such row comes after every value.
    """

    def __init__(self, most: int = BLOCKS) -> None:
        self.most, self.size = most, 1
        self.blocks: list[Block] = []
        self.best_low: tuple[int, float] | None = None
        self.best_high: tuple[int, float] | None = None
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None
        self.without, self.ended_without = 0, False

    def add(self, step: int, value: Any) -> None:
        """Add a value; what is no finite number is counted and left out."""
        number = None if abs(step) > _MOST_STEP else _finite(value)
        self.ended_without = number is None
        if number is None:
            self.without += 1
            return
        if self.best_low is None or number < self.best_low[1]:
            self.best_low = (step, number)
        if self.best_high is None or number > self.best_high[1]:
            self.best_high = (step, number)
        self.first = self.first or (step, number)
        self.last = (step, number)
        new = Block(step, step, number, number, number)
        if self.blocks and self.blocks[-1].count < self.size:
            self.blocks[-1].join(new)
            return
        if len(self.blocks) == self.most:
            self.size *= 2
            for first, second in zip(self.blocks[::2], self.blocks[1::2]):
                first.join(second)
            self.blocks = self.blocks[::2]
        self.blocks.append(new)

    def mean_of_last(self, share: float = 0.1) -> float | None:
        """Return the mean over the last part of all values, at least one block; None where there is none."""
        wanted, total, count = share * sum(block.count for block in self.blocks), 0.0, 0
        for block in reversed(self.blocks):
            total, count = total + block.total, count + block.count
            if count >= wanted:
                break
        return total / count if count else None


def _finite(value: Any) -> float | None:
    """Return a finite number as a float; a whole number may be longer than any float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= 1e300 and math.isfinite(value) else None


@dataclass
class Figures:
    """What the rows of a run say.

    Attributes:
        losses: name -> series, "loss" first.
        others: lr, grad_norm and other numbers.
        rate: samples a second.
        counted: what is counted (tokens, pairs, positives) a second.
        evaluations: name -> series.
        last_rows: the last evaluations, whole.
        rows: how many rows there are.
        last_step: of any row.
        samples: seen at the end, 0 where it is not told.
        seconds: of all updates together.
    """

    losses: dict[str, Series] = field(default_factory=dict)
    others: dict[str, Series] = field(default_factory=dict)
    rate: Series = field(default_factory=Series)
    counted: Series = field(default_factory=Series)
    evaluations: dict[str, Series] = field(default_factory=dict)
    last_rows: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    rows: int = 0
    last_step: int = 0
    samples: int = 0
    seconds: float = 0.0


def read_figures(run: Path, most: int = BLOCKS) -> Figures:
    """Read a run's metrics.

    Args:
        run: its folder.
        most: blocks of a series.

    Raises:
        TensorkeepError: a row amid others cannot be read.
    """
    found = Figures(rate=Series(most), counted=Series(most))
    before: tuple[int, int] | None = None  # step and samples of the update before
    for row in metrics.stream(run / metrics.METRICS):
        step = row["step"]
        found.rows += 1
        found.last_step = max(found.last_step, step) if abs(step) <= _MOST_STEP else found.last_step
        if "evaluation" in row:
            if isinstance(row["evaluation"], Mapping):
                told = _in_percent(row["evaluation"])
                _add(found.evaluations, told, step, most)
                found.last_rows = [*found.last_rows[-_LAST + 1 :], (step, told)]
            continue
        numbers = {name: value for name, value in row.items() if name not in _KNOWN}
        _add(found.losses, {n: v for n, v in numbers.items() if "loss" in n}, step, most)
        _add(found.others, {n: v for n, v in numbers.items() if "loss" not in n}, step, most)
        before = _pace(found, row, before)
    if "loss" in found.losses:
        found.losses = {"loss": found.losses["loss"], **found.losses}
    return found


def _add(into: dict[str, Series], numbers: Mapping[str, Any], step: int, most: int) -> None:
    """Add each number of a row to its series; names beyond the first 64 are left out."""
    for name, value in numbers.items():
        if name not in into:
            if len(into) >= _NAMES:
                continue
            into[name] = Series(most)
        into[name].add(step, value)


def _in_percent(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Name and scale mAP and recall, which files hold as shares of 1, as people read them."""
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        share = is_share(name) and isinstance(value, (int, float)) and not isinstance(value, bool)
        found |= {f"{name}, percent": 100 * value} if share else {name: value}
    return found


def _pace(found: Figures, row: Mapping[str, Any], before: tuple[int, int] | None) -> tuple[int, int] | None:
    """Note how fast an update was: `seconds` is the mean over the updates since the row before."""
    step, samples, seconds, counted = row["step"], row.get("samples"), row.get("seconds"), row.get("count")
    if type(samples) is not int or not 0 <= samples <= _MOST_STEP or not isinstance(seconds, (int, float)):
        return before
    found.samples = max(found.samples, samples)
    last_step, last_samples = before or (0, 0)
    updates = step - last_step
    if updates > 0 and 0 < seconds < 1e12:
        found.seconds += seconds * updates
        if samples > last_samples:
            found.rate.add(step, (samples - last_samples) / updates / seconds)
        if isinstance(counted, (int, float)) and not isinstance(counted, bool) and 0 <= counted < 1e15:
            found.counted.add(step, counted / seconds)
    return step, samples


def shown(found: Mapping[str, Series]) -> Iterator[tuple[str, Series]]:
    """Yield the series that have values."""
    return ((name, series) for name, series in found.items() if series.blocks)
