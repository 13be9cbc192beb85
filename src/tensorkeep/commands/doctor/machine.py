"""What the machine has, asked of the system alone: processors, memory, limits, caches, disks."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorkeep.storage.hub import cache_folder

_SECONDS = 0.5  # to count what a cache holds


def python() -> dict[str, str]:
    """Return the interpreter's version, place and platform."""
    version = platform.python_version()
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        version += " (free-threaded)"
    return {"version": version, "executable": sys.executable, "platform": platform.platform()}


def hardware() -> dict[str, Any]:
    """Return processors, memory in bytes, the limit of open files, and the C compiler that torch.compile would use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    return {
        "cpus": os.cpu_count(),
        "cpus_usable": usable,
        "cpu_limit": _cpu_limit(),
        "sha_instructions": _sha(),
        "memory": _memory(),
        "memory_available": _available(),
        "memory_limit": _memory_limit(),
        "open_files": _open_files(),
        "compiler": shutil.which(compiler) if compiler else None,
    }


def _text(path: str) -> str:
    """Return a system file's text; empty where it is not there."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _cpu_limit() -> float | None:
    """Return how many processors the container may use; None where nothing limits it."""
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and all(q.isdigit() and int(q) for q in quota):
        return round(int(quota[0]) / int(quota[1]), 2)
    return None


def _sha() -> bool | None:
    """Return whether the processor has instructions for SHA-256; None where the system does not say."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return None if flags is None else not {"sha_ni", "sha2"}.isdisjoint(flags[1].split())


def _memory() -> int | None:
    """Return the machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _available() -> int | None:
    """Return the memory that a new program could have."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _memory_limit() -> int | None:
    """Return the container's limit of memory, where it is below the machine's."""
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        text = _text(place).strip()
        if text.isdigit() and int(text) < (_memory() or 0):
            return int(text)
    return None


def _open_files() -> dict[str, int | str] | None:
    """Return how many files a process may have open, now and at most."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    none = resource.RLIM_INFINITY
    return {"soft": "no limit" if soft == none else soft, "hard": "no limit" if hard == none else hard}


def caches() -> list[dict[str, Any]]:
    """Return the Hugging Face cache's place and size; counting stops after half a second and says so."""
    place = cache_folder()
    held, counted = _held(place)
    return [
        {"name": "Hugging Face", "path": str(place), "exists": place.is_dir(), "bytes": held, "counted": counted},
    ]


def _held(folder: Path) -> tuple[int, bool]:
    """Return the bytes of a folder's files, links not followed, and whether all were counted in time."""
    until, held, left = time.monotonic() + _SECONDS, 0, [str(folder)]
    while left:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if time.monotonic() > until:
                    return held, False
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif not entry.is_symlink():
                        held += entry.stat(follow_symlinks=False).st_size
    return held, True


def disks() -> list[dict[str, Any]]:
    """Return the room where a command would write: the working folder and the folder for temporary files."""
    rows = []
    for name, find in (("working folder", os.getcwd), ("temporary files", tempfile.gettempdir)):
        row: dict[str, Any] = {"name": name, "path": "not there", "free": None, "total": None}
        with contextlib.suppress(OSError):
            row["path"] = find()
            usage = shutil.disk_usage(row["path"])
            row |= {"free": usage.free, "total": usage.total}
        rows.append(row)
    return rows
