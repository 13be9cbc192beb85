"""Which temporary names were left by commands that were killed, told from those of commands that are at work.

Whoever writes into a folder under a temporary name holds a shared lock on the folder (`flock`, which the kernel gives
back when a process dies). Who gets the lock alone knows that every temporary name in the folder is a dead one's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from tensorkeep.storage.files import TEMPORARY

BEFORE = ".old"  # before TEMPORARY in the name of what stood in place, moved aside for the new one
KEPT = 40  # characters of the sink's name in a temporary one, so that no file system finds it too long
NAME = re.compile(rf"\.(?P<sink>.+)\.[0-9a-f]{{8}}(?P<old>{re.escape(BEFORE)})?{re.escape(TEMPORARY)}", re.DOTALL)
_PATIENCE = 40  # times 0.05 s: those who look which names are dead hold the lock for one listing


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Hold the lock that says: temporary names in this folder may be at work. Several writers may hold it at once.

    Where the file system has no such locks the body runs without one; there nothing is ever taken for dead.

    Args:
        folder: an existing folder.

    Yields:
        Nothing.
    """
    handle = _locked(folder, fcntl.LOCK_SH, _PATIENCE)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def dead_names(folder: Path) -> list[Path]:
    """List the temporary names of ours in a folder whose writer is gone, sorted.

    Args:
        folder: the folder; where it is none, or a writer may be at work in it, the list is empty.

    Returns:
        Their paths.
    """
    handle = _locked(folder, fcntl.LOCK_EX, 1)
    if handle is None:
        return []
    try:
        return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.lstat().st_uid == os.geteuid())
    except OSError:
        return []
    finally:
        os.close(handle)


def _locked(folder: Path, how: int, times: int) -> int | None:
    """Open a folder and lock it without waiting long; None where that cannot be had."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    for turn in range(times):
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if turn + 1 < times:
                time.sleep(0.05)
        except OSError:
            break  # a file system without such locks
        else:
            return handle
    os.close(handle)
    return None
