"""What a start does when torchrun has started the processes of this very job before.

torchrun starts all processes again, with the same words, when one of them has died. `--resume never`, or a step that
was named, was meant for the first start: the later ones go on from the run's newest checkpoint. Whether the first start
got so far that the run's checkpoints are its own is noted in `RUN/.started`, only where it matters.
"""

from __future__ import annotations

import os
from pathlib import Path

from tensorkeep.storage.files import explained, open_plain
from tensorkeep.storage.run_folder import make_folder

MARK = ".started"
LOCK_WAIT = 120.0  # seconds; a file server may keep the lock of a lost host so long


def restarts() -> int:
    """Return how often torchrun has started this job's processes again; 0 without torchrun."""
    word = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(word) if word.isdigit() else 0


def meant(run: Path, resume: str) -> str:
    """Return what `--resume` means in this start; the first rank alone asks, before it chooses a checkpoint.

    Args:
        run: the run's folder.
        resume: as it was given.

    Returns:
        `auto` where this job has begun the run in an earlier start, else what was given.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if resume == "auto" or job is None:
        return resume
    mark = run / MARK
    if not restarts():
        mark.unlink(missing_ok=True)
        return resume
    try:
        with os.fdopen(open_plain(mark, os.O_RDONLY), "rb") as file:
            return "auto" if file.read(4096) == job.encode() else resume
    except FileNotFoundError:
        return resume


def begun(run: Path, resume: str) -> None:
    """Note that this job has begun the run; the first rank alone does, once what it begins from is chosen."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if resume == "auto" or job is None:
        return
    with explained(run):
        make_folder(run)
        handle = open_plain(run / MARK, os.O_WRONLY | os.O_CREAT)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, job.encode(), 0)
        finally:
            os.close(handle)
