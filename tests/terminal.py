"""A program on a terminal of its own: what it writes there, and what stands on the screen in the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests import forked
from tests.forked import take_terminal

CTRL_C = b"\x03"
ROOT = Path(__file__).parent.parent


class Terminal:
    """A command whose stdin, stdout and stderr are one terminal of this size; `fork`: as `tests.forked` starts it."""

    def __init__(
        self, words: Sequence[object], columns: int = 100, env: Mapping[str, str] | None = None, fork: bool = False
    ) -> None:
        self.mine, theirs = pty.openpty()
        self.resize(columns)
        kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
        path = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        start: Any = (
            partial(forked.Popen, terminal=True) if fork else partial(subprocess.Popen, preexec_fn=take_terminal)
        )
        self.process: subprocess.Popen[bytes] = start(
            [sys.executable, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs,
            env={**kept, **path, **(env or {})}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.written = b""

    def resize(self, columns: int, rows: int = 30) -> None:
        """Give the terminal another size; its program is told by SIGWINCH, as ever."""
        fcntl.ioctl(self.mine, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """Type keys; `CTRL_C` is one."""
        os.write(self.mine, keys)

    def read(self, until: Callable[[str], bool] = lambda text: False, limit: float = 60.0) -> str:
        """Read until that is there, or the program has ended; returns all that was written so far."""
        end = time.monotonic() + limit
        while time.monotonic() < end and not until(self.text):
            if not select.select([self.mine], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(self.mine, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
            if not piece:
                break
            self.written += piece
        return self.text

    @property
    def text(self) -> str:
        return self.written.decode()

    def close(self) -> int:
        """Read the rest; returns the exit code, negative where a signal ended the program."""
        try:
            self.read(limit=90.0)
            return self.process.wait(30.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            os.close(self.mine)


def shown(text: str) -> list[str]:
    """The lines of the screen after all that was written, for the few commands that this program gives a terminal."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        elif part in ("\x1b[2K", "\x1b[K"):
            lines[-1] = "" if part == "\x1b[2K" else lines[-1][:column]
        elif part in ("\x1b[?1049l", "\x1b[?25h", "\x1b[?25l"):
            pass
        else:
            assert not part.startswith("\x1b"), f"a command that no test knows: {part!r}"
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return lines
