"""Log updates: a row in `metrics.jsonl` and for every tracker, and the status line a person watches.

Numbers leave the device only for updates that are logged, so the others wait for nothing.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output, size, sparkline
from tensorkeep.training import distributed, metrics
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.status import StatusFile

if TYPE_CHECKING:
    from tensorkeep.training.saver import Saver

NOTHING = 20  # updates of a loss that is exactly 0
_BARS, _KEPT = 16, 512  # bars of the losses on a terminal, and how many of these they are about


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
    """Writes the rows of a run; every rank calls `note`, the first one writes.

    Args:
        run: the run's folder.
        job: what trains.
        loop: how it is to go.
        world: this process among its peers.
        scaler: torch's gradient scaler.
        say: where the status line goes.
        status: the run's status.json; None on other ranks than the first.
        saver: writes the run's checkpoints.
    """

    def __init__(
        self,
        run: Path,
        job: Job,
        loop: Loop,
        world: World,
        scaler: Any,
        say: Output,
        status: StatusFile | None = None,
        saver: Saver | None = None,
    ) -> None:
        self.path, self.job, self.loop, self.world, self.scaler = run / metrics.METRICS, job, loop, world, scaler
        self.file, self.saver = status, saver
        self.losses: deque[float] = deque(maxlen=_KEPT)
        self.proof = ""  # what the last steps that were made again said of the resume
        self.since, self.steps, self.counted = time.monotonic(), 0, 0.0
        self.status = say.status() if world.first else None
        self.zero: int | None = None  # the update from which on every loss that was read is exactly 0

    def note(self, step: int, samples: int, made: Update) -> None:
        """Note update `step`, and write a row where one is due.

        Raises:
            TensorkeepError: the loss is not finite (V01), or exactly 0 for too long; on every rank alike.
        """
        self.steps, self.counted = self.steps + 1, self.counted + made.count
        if self.file and self.file.due:
            self.file.note(step=step, doing=None, memory=self._memory())
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
            "memory": round(self._memory() / 2**30, 4),
        }
        self.write(row)
        if math.isfinite(row["loss"]):
            self.losses.append(row["loss"])
        if self.status:
            unit, each = self.job.pace
            amount = self.counted if each is None else self.steps * self.loop.batch * each
            rate = f"{amount / max(now - self.since, 1e-9):,.0f} {unit}/s"
            self.status.show(self._line(row, rate), step, self.loop.updates, lambda: self._parts(row, rate))
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
        memory = f"  {size(self._memory(), memory=True)}" if self.world.device.type == "cuda" and self._memory() else ""
        return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad norm {row['grad_norm']:.3g}  {rate}{memory}"

    def _parts(self, row: Mapping[str, Any], rate: str) -> list[str]:
        """What a terminal shows after step and time left, the most important first."""
        bars, saved = sparkline(self.losses, _BARS, sys.stderr), self.saver.newest if self.saver else None
        return [
            f"loss {row['loss']:.4f}",
            bars,
            rate,
            f"{size(self._memory(), memory=True)} memory",
            "" if saved is None else f"saved {saved}",
            self.proof,
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm']:.3g}",
        ]

    def _memory(self) -> int:
        """The most bytes that this process has held at once until now: of the GPU, without one of the machine.

        The counter of the GPU is never set back here: others may measure with it.
        """
        if self.world.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.world.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def proven(self, steps: list[int], equal: bool) -> None:
        """Note what the losses of steps that were made again say of the resume."""
        self.proof = "resume exact" if equal else f"resume differs at {steps[0]}"
        if self.file:
            self.file.note(proof={"steps": steps, "equal": equal})

    def doing(self, what: str | None, step: int) -> None:
        """Note that the run is at something that may take long, or no longer (None)."""
        if self.file:
            self.file.note(doing=what, step=step)

    def close(self) -> None:
        """End the status line, and note how much memory it took."""
        if self.file:
            self.file.note(memory=self._memory())
        if self.status:
            self.status.close()
