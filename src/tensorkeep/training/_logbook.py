"""Log updates: a row in `metrics.jsonl` and for every tracker, and the status line a person watches.

Numbers leave the device only for updates that are logged, so the others wait for nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output, size
from tensorkeep.training import distributed, metrics
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop

NOTHING = 20  # updates of a loss that is exactly 0


@dataclass(frozen=True)
class Update:
    """The numbers of one update, still on the device.

    Args:
        losses: this rank's share of each named loss.
        norm: of all gradients, before clipping.
        count: what the losses' sums were divided by (tokens, pairs, positives), over all ranks.
    """

    losses: dict[str, Tensor]
    norm: Tensor
    count: float


def due(step: int, every: int | None) -> bool:
    """Whether what happens every `every` updates (None: never) happens after this one."""
    return every is not None and step % every == 0


class Log:
    """Writes the rows of a run; every rank calls `note`, the first one writes."""

    def __init__(self, run: Path, job: Job, loop: Loop, world: World, scaler: Any, say: Output) -> None:
        self.path, self.job, self.loop, self.world, self.scaler = run / metrics.METRICS, job, loop, world, scaler
        self.since, self.steps, self.counted = time.monotonic(), 0, 0.0
        self.status = say.status() if world.first else None
        self.zero: int | None = None  # the update from which on every loss that was read is exactly 0

    def note(self, step: int, samples: int, made: Update) -> None:
        """Note update `step`, and write a row where one is due.

        Raises:
            TensorkeepError: the loss is not finite (V01), or exactly 0 for too long; on every rank alike.
        """
        self.steps, self.counted = self.steps + 1, self.counted + made.count
        if not (due(step, self.loop.log_every) or step == self.loop.updates or step == 1):
            return
        names = sorted(made.losses)
        values = dict(zip(names, distributed.total(self.world, *(float(made.losses[n]) for n in names))))
        if not math.isfinite(values["loss"]) and not self._scaler_helps():
            raise TensorkeepError(
                f"the loss of step {step} is {values['loss']}",
                where=self.path.parent,
                code="V01",
                hint="the checkpoints are from before it; a lower learning rate, clip or bf16 instead of fp16 may help",
            )
        self._refuse_nothing(step, values["loss"])
        if not self.world.first:
            return
        now = time.monotonic()
        row = {
            "step": step,
            "samples": samples,
            **values,
            "lr": self.job.optimizer.param_groups[0]["lr"],
            "grad_norm": float(made.norm),
            "count": made.count,
            "seconds": (now - self.since) / self.steps,
        }
        self.write(row)
        if self.status:
            unit, each = self.job.pace
            amount = self.counted if each is None else self.steps * self.loop.batch * each
            line = self._line(row, f"{amount / max(now - self.since, 1e-9):,.0f} {unit}/s")
            self.status.show(line, step, self.loop.updates)
        self.since, self.steps, self.counted = now, 0, 0.0

    def _refuse_nothing(self, step: int, loss: float) -> None:
        """Stop where the loss is exactly 0 at every update that was read over 20: nothing is learned."""
        if loss != 0:
            self.zero = None
            return
        self.zero = step if self.zero is None else self.zero
        if step - self.zero >= NOTHING:
            raise TensorkeepError(
                f"the loss is exactly 0 from update {self.zero} to {step}: nothing is learned",
                where=self.path.parent,
                hint="no sample has a label that counts: look at the data (tensorkeep check detection RECIPE)",
            )

    def write(self, row: dict[str, Any], durable: bool = False) -> None:
        """Write a row to the file and to every tracker; `durable` waits for the disk."""
        metrics.append(self.path, row, durable)
        for track in self.job.trackers:
            track(metrics.finite(row))

    def _scaler_helps(self) -> bool:
        """Whether an overflow is no fault: in fp16 the update is skipped and the scale halved, until it is below 1."""
        return bool(self.scaler.is_enabled()) and float(self.scaler.get_scale()) >= 1.0

    def _line(self, row: Mapping[str, Any], rate: str) -> str:
        """The status line."""
        held = torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0
        memory = f"  {size(held)}" if held else ""
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  |g| {row['grad_norm']:.3g}  {rate}{memory}"

    def close(self) -> None:
        """End the status line."""
        if self.status:
            self.status.close()
