"""Run a command and measure wall time, CPU time and peak anonymous memory (RssAnon, sampled); warm or cold cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    """Seconds of wall and CPU time, peak anonymous bytes, the command's standard output."""

    wall: float
    cpu: float
    anonymous: int
    out: str


def run(command: list[str], **environment: str) -> Run:
    """Run to the end; raise with its stderr if it fails. Memory is the process's own, children are not added."""
    before = os.times()
    started = time.perf_counter()
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.01)
    wall = time.perf_counter() - started
    out, err = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{err}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, peak, out)


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 where it has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def forget(path: Path) -> None:
    """Push a folder's files out of the page cache: written back, then dropped."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def remember(path: Path) -> None:
    """Read a folder's files into the page cache."""
    for file in [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def versions(*packages: str) -> str:
    """`python 3.11.7, torch 2.13.0, ...` for the head of a table."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {sys.version.split()[0]}"]
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)
