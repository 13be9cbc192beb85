"""Prove that a resume was exact: compare the losses of the first two steps with those made before it.

The losses of the two steps after each checkpoint are noted in `checkpoints/proof.jsonl`, in hexadecimal, so that no
digit is lost. A run that goes on makes those steps again. Equal losses confirm that everything which matters came back;
a difference is told with both numbers and what differs between the two starts. What came of it is noted in
`checkpoints/resumes.jsonl`, a row for each start that went on and what it could compare.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tensorkeep.output import Output
from tensorkeep.training import distributed, metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World

STEPS = 2  # the first shows that weights and data came back, the second that the optimizer did


class Proof:
    """Notes losses after saves, and compares those that are made again with what was noted before.

    Args:
        run: the run's folder.
        facts: what `_resume.facts` says of this start.
        resumed: the step the run goes on from, None where it begins anew.
        say: where the verdict goes; None on a rank that only takes part in the sums.
        tell: is given the steps of a verdict, and whether their losses are equal.
    """

    def __init__(
        self,
        run: Path,
        facts: dict[str, Any],
        resumed: int | None,
        say: Output | None,
        tell: Callable[[list[int], bool], None] = lambda steps, equal: None,
    ) -> None:
        self.tell = tell
        self.path, self.facts, self.say, self.since = run / "checkpoints" / metrics.PROOF, facts, say, resumed
        self.resumed, self.resumes = resumed, self.path.with_name(metrics.RESUMES)
        self.confirmed: list[int] = []
        self.waiting: list[metrics.Row] = []  # of a first checkpoint that is still on its way to the disk
        self.known: dict[int, metrics.Row] = {}
        if say is not None and self.path.exists():
            there = set(checkpoint.steps(run))
            # of steps that are gone nobody resumes; a line that a kill cut short must not merge with the next
            metrics.keep(self.path, lambda row: _sound(row) and row["checkpoint"] in there and resumed is not None)
            self.known = {row["step"]: row for row in metrics.rows(self.path)}  # the last word on a step counts
        if say is not None and self.resumes.exists():
            metrics.keep(self.resumes, lambda row: resumed is not None)  # none where the run begins anew

    def saved(self, step: int) -> None:
        """Begin to note the steps that follow a checkpoint."""
        self._confirm()
        self._write()
        self.since = step

    def note(self, step: int, loss: Tensor, world: World) -> None:
        """Note or compare the loss of update `step`, of which `loss` is this rank's share; every rank calls it."""
        if self.since is None or not self.since < step <= self.since + STEPS:
            return
        value = distributed.total(world, float(loss))[0].hex()
        if self.say is None:
            return
        then = self.known.pop(step, None)
        if then is None and self.resumed is not None and step == self.resumed + 1:
            self._came_to(None, [])
        if then is not None and then["loss"] == value:
            self.confirmed.append(step)
            if step == self.since + STEPS or step + 1 not in self.known:
                self._confirm()
            return
        self.waiting.append({"checkpoint": self.since, "step": step, "loss": value, "facts": self.facts})
        self._write()
        if then is not None:
            self._differs(then, value)

    def close(self) -> None:
        """Say what was confirmed so far, and write what was noted."""
        self._confirm()
        self._write()

    def _write(self) -> None:
        """Append what was noted, once the folder is there."""
        if self.path.parent.is_dir():
            for row in self.waiting:
                metrics.append(self.path, row)
            self.waiting.clear()

    def _confirm(self) -> None:
        """Say for which steps the losses were equal."""
        if self.confirmed and self.say is not None:
            steps = ", ".join(map(str, self.confirmed))
            self.say.remark(f"exact resume confirmed for steps {steps}: their losses are equal, bit for bit")
            self._came_to(True, self.confirmed)
            self.tell(self.confirmed, True)
        self.confirmed = []

    def _came_to(self, equal: bool | None, steps: list[int], **more: Any) -> None:
        """Note what a start that goes on compared; `equal` is None where no later step had been made before."""
        if self.path.parent.is_dir():
            metrics.append(self.resumes, {"step": self.resumed, "equal": equal, "steps": steps, **more})

    def _differs(self, then: metrics.Row, value: str) -> None:
        """Say that a loss is another, and what differs between the two starts."""
        assert self.say is not None
        before, after = float.fromhex(then["loss"]), float.fromhex(value)
        noted = then["facts"] if isinstance(then.get("facts"), dict) else {}
        facts = [f"{k} {v} -> {self.facts.get(k)}" for k, v in noted.items() if v != self.facts.get(k)]
        self._came_to(False, [then["step"]], was=then["loss"], now=value, differs=facts)
        why = f"; differs in {', '.join(facts)}" if facts else "; nothing in torch, device, threads or split differs"
        self.say.remark(f"step {then['step']} is not bitwise what it was: loss {before!r}, now {after!r}{why}")
        self.tell([then["step"]], False)


def _sound(row: metrics.Row) -> bool:
    """Whether a row is one that this module wrote: no digest guards the file."""
    try:
        float.fromhex(row["loss"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return type(row.get("checkpoint")) is int
