"""Running OpenTAD's tools: its checkout, its own interpreter, the tiny config, and what they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import string
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tensorkeep.formats.view import read

HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "src"
OURS = "tensorkeep.integrations.opentad"
SECONDS = 1800  # a run that takes longer hangs


class Guest(NamedTuple):
    """OpenTAD's checkout, the interpreter of its environment, and a folder to work in."""

    checkout: Path
    python: Path
    folder: Path


class Ended(NamedTuple):
    """`code`: the exit code, negative where killed. `log`: all it printed."""

    code: int
    log: str

    @property
    def complaint(self) -> str:
        """The last line of a traceback, or of the log."""
        lines = [line for line in self.log.splitlines() if line.strip() and not line.startswith((" ", "hint:"))]
        return lines[-1][:160] if lines else ""


def configured(
    guest: Guest, name: str, backbone: str, imports: list[str] | None = None, pretrain: str = "None"
) -> Path:
    """The config of a run named `name`, which works in a folder of that name; `backbone`: its `dict(...)` as text."""
    text = (HERE / "config.template").read_text()
    folder = guest.folder / name
    folder.mkdir(parents=True)
    filled = string.Template(text).substitute(
        DATA=guest.folder / "data",
        WORK=folder,
        IMPORTS=[OURS] if imports is None else imports,
        BACKBONE=backbone,
        PRETRAIN=pretrain,
    )
    config = folder / "config.py"
    config.write_text(filled)
    return config


def run(guest: Guest, tool: str, *arguments: object, kill: Callable[[str], bool] | None = None) -> Ended:
    """One of OpenTAD's tools (or a script of ours) to its end, or to a SIGKILL once `kill` of its log is true."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "shim", HERE, SOURCE))),
        "OPENTAD_WITHOUT_GPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    log = guest.folder / "last.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(guest.python), tool, *map(str, arguments)],
            cwd=guest.checkout,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until = time.monotonic() + SECONDS
        while process.poll() is None:
            if time.monotonic() > until or (kill is not None and kill(log.read_text())):
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.005 if kill is not None else 0.1)
    return Ended(process.wait(), log.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def checkpoint(guest: Guest, name: str, epoch: int) -> Path:
    return guest.folder / name / "gpu1_id0" / "checkpoint" / f"epoch_{epoch}.pth"


def different(one: Path, other: Path) -> list[str]:
    """Names of tensors and plain values (random states, schedule, groups) in which two files differ by a bit."""
    a, b = read(one), read(other)
    odd = sorted(set(a) ^ set(b) | set(a.entries) ^ set(b.entries))
    tensors = [n for n in a if n in b and (a[n].dtype, a.digest(n)) != (b[n].dtype, b.digest(n))]
    return odd + tensors + [n for n, v in a.entries.items() if n in b.entries and b.entries[n] != v]
