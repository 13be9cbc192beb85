"""Look at a run through its files: how it stands, and whether its process lives.

The lock on `RUN/.lock` is held exactly as long as the process that trains lives. Seen from its own machine it decides;
from another one, whose file server may not pass locks on, a lock that is held still says that the run lives, and one
that is not says nothing: then the age of the last sign counts.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import explained, open_plain
from tensorkeep.training.metrics import METRICS
from tensorkeep.training.status import RUNNING, STATUS, here, holder, read_status

ENDED = {"done": 0, "stopped early": 0, "interrupted": 0, "failed": 1, "dead": 1, "silent": 3, "unknown": 3}
_SILENT, _PACES = 120.0, 10.0  # seconds without a sign, and in updates, after which nobody can say that a run lives
_FIRST, _LINE = 4 << 20, 1 << 20  # bytes of the metrics that are read at first; a line that is longer is none
_ROWS = 512  # the newest rows, whose losses are drawn


@dataclass(frozen=True)
class Look:
    """How a run stands; None where its files do not say.

    Args:
        run: its folder.
        state: starting, running, or how it ended: done, stopped early, interrupted, failed; dead: its process is gone
            and left no reason; silent: there is no sign of life, and its machine is another; unknown: no status.json.
        status: what status.json says.
        row: the newest row of an update.
        evaluation: the newest row of an evaluation.
        losses: of the newest updates, oldest first.
        seconds: an update takes.
        age: seconds since the last sign.
        saved: the step of the newest checkpoint.
        best: the step that `best` names.
        damaged: lines of metrics.jsonl, of those that were read, that are no rows.
        fresh: whether anything was written since the last look.
    """

    run: Path
    state: str
    status: dict[str, Any] | None
    row: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    losses: list[float]
    seconds: float | None
    age: float | None
    saved: int | None
    best: int | None
    damaged: int
    fresh: bool

    @property
    def step(self) -> int | None:
        """The last step that anything tells of."""
        told = [self.row["step"] if self.row else None, (self.status or {}).get("step")]
        return max((int(step) for step in told if step is not None), default=None)

    @property
    def updates(self) -> int | None:
        """How many the run is to make."""
        return self.status["updates"] if self.status else None

    @property
    def left(self) -> float | None:
        """Seconds until the last update."""
        if self.state != RUNNING or self.seconds is None or self.updates is None or self.step is None:
            return None
        return self.seconds * max(self.updates - self.step, 0)

    @property
    def rate(self) -> tuple[float, str] | None:
        """What is learned from a second, and its unit."""
        pace, seconds = (self.status or {}).get("pace"), number(self.row, "seconds")
        if not pace or not seconds or self.status is None:
            return None
        amount = number(self.row, "count") if pace[1] is None else (self.status["batch"] or 0) * pace[1]
        return None if amount is None else (amount / seconds, pace[0])


def number(row: dict[str, Any] | None, name: str) -> float | None:
    """A finite number of a row, None where it has none of this name."""
    value = (row or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or value != value:
        return None
    return float(value)


@dataclass
class Rows:
    """The newest rows of a file that grows, is cut short by a resume, and may hold anything."""

    path: Path
    place: tuple[int, int] | None = None  # device and inode that were read
    at: int = 0
    rest: bytes = b""  # the beginning of a line that is still being written
    damaged: int = 0
    rows: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_ROWS))
    evaluation: dict[str, Any] | None = None

    def read(self) -> bool:
        """Read what is new; whether there was anything."""
        try:
            handle = open_plain(self.path, os.O_RDONLY)
        except FileNotFoundError:
            self._forget(None)
            return False
        with explained(self.path), os.fdopen(handle, "rb") as file:
            state = os.fstat(file.fileno())
            place = (state.st_dev, state.st_ino)
            if place != self.place or state.st_size < self.at:  # a resume wrote it anew
                self._forget(place)
                self.at = max(state.st_size - _FIRST, 0)
            skipping = self.at > 0 and not self.rest and not self.rows
            file.seek(self.at)
            new = file.read(_FIRST)
        self.at += len(new)
        *whole, self.rest = (self.rest + new).split(b"\n")
        for line in whole[skipping:]:
            self._take(line)
        self.rest = self.rest[-_LINE:]
        return bool(new)

    def _forget(self, place: tuple[int, int] | None) -> None:
        self.place, self.at, self.rest, self.damaged, self.evaluation = place, 0, b"", 0, None
        self.rows.clear()

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line) if len(line) < _LINE else None
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 1 << 53:
            self.damaged += 1
        elif isinstance(row.get("evaluation"), dict):
            self.evaluation = row
        else:
            while self.rows and self.rows[-1]["step"] >= row["step"]:
                self.rows.pop()  # made again
            self.rows.append(row)


class Looking:
    """Looks at one run, again and again.

    Args:
        run: its folder.

    Raises:
        TensorkeepError: no run is there.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.rows = run, Rows(run / METRICS)
        self._seen: tuple[Any, ...] = ()
        self._since: float | None = None  # when a change was seen, by this machine's clock
        with explained(run):
            is_run = run.is_dir() and any(os.path.lexists(run / name) for name in (STATUS, METRICS, run_folder.LOCK))
        if not is_run:
            what = "no run is there" if run.is_dir() else "no such folder" if not run.exists() else "is no run's folder"
            hint = "name the folder of `tensorkeep train --out RUN`; a new run's is there once its model is built"
            raise TensorkeepError(what, where=run, hint=hint)

    def look(self) -> Look:
        """Look once."""
        held, status = holder(self.run), read_status(self.run)
        new = self.rows.read()
        state = self._state(status, held)
        if state == "dead":  # it may have ended well between the two looks
            time.sleep(0.2)
            status = read_status(self.run)
            state, new = self._state(status, holder(self.run)), self.rows.read() or new
        saved = next(iter(run_folder.steps(self.run)), None)
        try:
            best = run_folder.named_step(self.run, run_folder.BEST)
        except TensorkeepError:
            best = None
        updates = list(self.rows.rows)
        losses = [loss for row in updates if (loss := number(row, "loss")) is not None]
        return Look(
            self.run, state, status, updates[-1] if updates else None, self.rows.evaluation, losses, self._seconds(),
            self._age(status), saved, best, self.rows.damaged, new,
        )  # fmt: skip

    def _state(self, status: dict[str, Any] | None, held: int | None) -> str:
        """How the run stands, from what it says of itself and who holds its lock."""
        mine = here()
        near = status is not None and status["boot"] is not None and status["boot"] == mine["boot"]
        if held is not None:
            another = near and status is not None and held not in (0, status["pid"])
            return "starting" if status is None or status["state"] != RUNNING or another else RUNNING
        if status is None:
            return "unknown"
        if status["state"] != RUNNING:
            return str(status["state"]) if status["state"] in ENDED else "unknown"
        if near:
            return "dead"
        age, pace = self._age(status), self._seconds() or 0.0
        return "silent" if age is None or age > max(_SILENT, _PACES * pace) else RUNNING

    def _seconds(self) -> float | None:
        """Seconds that an update takes, of the newest rows."""
        newest = list(self.rows.rows)[-50:]
        told = [s for row in newest if (s := number(row, "seconds")) is not None and s > 0]
        return statistics.median(told) if told else None

    def _age(self, status: dict[str, Any] | None) -> float | None:
        """Seconds since the last sign: by this machine's clock where a change was seen, else by the files' times."""
        seen = (self.rows.place, self.rows.at, status and status["updated"])
        if self._seen and seen != self._seen:
            self._since = time.monotonic()
        self._seen = seen
        if self._since is not None:
            return time.monotonic() - self._since
        signs = [status["updated"] or 0.0] if status else []
        for name in (METRICS, STATUS):
            try:
                signs.append((self.run / name).stat().st_mtime)
            except OSError:
                continue
        return max(time.time() - max(signs), 0.0) if signs else None
