"""`RUN/status.json`: where a run stands, for whoever looks on from another terminal or another machine.

The first process writes it when its start is through, every few seconds while updates are made, and when it ends. It
is no part of a run's state: a resume reads nothing from it, so it waits for no disk, and a failed write stops nothing.
Whether the process still lives is not in the file: the lock that it holds on `RUN/.lock` says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.files import explained, open_plain
from tensorkeep.storage.placement import temporary_name

STATUS = "status.json"
RUNNING, FAILED = "running", "failed"  # the other states are the reasons by which a run ends: done, ...
EVERY = 2.0  # seconds between two notes of how far the run is
_LARGEST = 1 << 20  # bytes


class StatusFile:
    """The status of a run that this process makes.

    Args:
        run: the run's folder, whose lock this process holds.
        facts: what does not change: `updates`, `batch`, `pace`, what the run was resumed from.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any]) -> None:
        self.path, self._last = run / STATUS, 0.0
        self.known: dict[str, Any] = {"schema": 1, "state": RUNNING, "doing": None, **here(), **facts}
        self.known |= {"started": time.time(), "proof": None, "error": None}

    def note(self, **facts: Any) -> None:
        """Note facts at once."""
        self.known |= facts | {"updated": time.time()}
        self._last = time.monotonic()
        temporary = temporary_name(self.path)
        try:
            temporary.write_text(json.dumps(self.known) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @property
    def due(self) -> bool:
        """Whether the last note is a few seconds old, so that it is time to say how far the run is."""
        return time.monotonic() - self._last >= EVERY

    def failed(self, error: BaseException) -> None:
        """Note what ended the run."""
        told = {"code": None, "message": f"{type(error).__name__}: {error}"[:2000], "hint": None}
        if isinstance(error, TensorkeepError):
            told = {"code": error.code, "message": error.line, "hint": error.hint}
        self.note(state=FAILED, error=told)


def ended(run: Path, why: str, hint: str) -> None:
    """Note why this process is about to end at once, where it is the one that keeps the run's status.

    Args:
        run: the run's folder.
        why: in words.
        hint: what to do.
    """
    with contextlib.suppress(TensorkeepError):
        found, mine = read_status(run), here()
        if found is not None and {name: found[name] for name in mine} == mine:
            file = StatusFile(run, {})
            file.known = {"schema": 1, **found}
            file.note(state=FAILED, error={"code": None, "message": why, "hint": hint})


def here() -> dict[str, Any]:
    """Return which process of which machine this is; `boot` tells two machines of one name apart.

    Returns:
        `host`, `pid` and `boot` (None where the system does not say).
    """
    boot = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": boot}


def ours(run: Path) -> bool:
    """Return whether `RUN/status.json` may be written: it is not there, or a run's."""
    path = run / STATUS
    try:
        return not os.path.lexists(path) or read_status(run) is not None
    except TensorkeepError:
        return False


def finished(run: Path, step: int, updates: int) -> bool:
    """Return whether the run is said to have ended at this step, of so many: there is nothing to add to that."""
    found = read_status(run)
    if found is None or found["state"] not in ("done", "stopped early"):
        return False
    return bool((found["step"], found["updates"]) == (step, updates))


def read_status(run: Path) -> dict[str, Any] | None:
    """Read the status of a run, as far as its values are what they should be.

    Args:
        run: the run's folder.

    Returns:
        The known fields; None where there is no such file, or it is no run's.

    Raises:
        TensorkeepError: it cannot be read.
    """
    path = run / STATUS
    with explained(path):
        if not path.exists():
            return None
    try:
        found = json.loads(read_small(path, _LARGEST))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("state"), str) or type(found.get("updates")) is not int:
        return None
    return {name: found.get(name) if kind(found.get(name)) else None for name, kind in _FIELDS.items()}


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4000


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e11


def _pace(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _text(value[0]) and (value[1] is None or _time(value[1]))


def _proof(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("equal"), bool):
        return False
    return isinstance(value.get("steps"), list) and all(map(_whole, value["steps"]))


def _error(value: Any) -> bool:
    words = [value.get("code") or "", value.get("hint") or "", value.get("message")] if isinstance(value, dict) else [0]
    return all(map(_text, words))


_FIELDS = {
    **dict.fromkeys(("state", "doing", "host", "boot", "level"), _text),
    **dict.fromkeys(("pid", "updates", "batch", "ranks", "resumed", "step", "memory"), _whole),
    **dict.fromkeys(("started", "updated"), _time),
    "pace": _pace,
    "proof": _proof,
    "error": _error,
}


def holder(run: Path) -> int | None:
    """Tell which process holds a run's lock, taking nothing: one of this machine or, where locks are shared, another's.

    Args:
        run: the run's folder.

    Returns:
        Its number (0: the system gives none), None where nobody that can be seen from here holds it.
    """
    if (os.getpid(), str(run.resolve())) in run_folder.held:
        return os.getpid()  # to close the file here would give the lock up
    if sys.platform != "linux":
        return None
    try:
        handle = open_plain(run / run_folder.LOCK, os.O_RDONLY)
    except (OSError, TensorkeepError):
        return None
    try:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(handle, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(handle)
    return None if kind == fcntl.F_UNLCK else max(pid, 0)
