"""`subprocess.run` and `Popen` for Python programs that import torch, forked from a process that has imported it.

Importing torch, transformers and PEFT takes 3.5 s of a processor, a fork of a process that holds them a few
milliseconds. What comes of it is a process as any other: a child of the one that asked, with a number, streams,
environment, folder and session of its own, that signals and exit codes end as ever, and whose modules are as they are
after their import. It is no new interpreter: what a test says of importing itself, of options and variables that are
read at a start, of loaded libraries or of the most memory needs `subprocess`.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import inspect
import json
import os
import socket
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fork_server import FREE, MODULES

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_Process = subprocess.Popen  # whoever may take its name later


class Server:
    """One process that forks; it ends with this one.

    Args:
        environment: what it is started with, and so what was there at the imports.
        modules: what it imports.
    """

    def __init__(self, environment: dict[str, str], modules: tuple[str, ...]) -> None:
        self.asked, theirs = socket.socketpair()
        words = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())]
        self.process = _Process(
            [*words, json.dumps(modules)],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self.close)

    def fork(self, request: dict[str, Any], handles: list[int]) -> int:
        """Have a process forked, which is then a child of this one; returns its number."""
        libc, body = ctypes.CDLL(None), json.dumps(request).encode()
        libc.prctl(_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self.asked, [len(body).to_bytes(8, "little")], handles)
            self.asked.sendall(body)
            answer = self.asked.recv(8, socket.MSG_WAITALL)
        except ConnectionError:
            answer = b""
        finally:
            libc.prctl(_SUBREAPER, 0, 0, 0, 0)
        assert answer, f"the process that forks has ended: {self.process.wait()}"
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        """End it."""
        atexit.unregister(self.close)
        self.asked.shutdown(socket.SHUT_RDWR)  # whoever was forked meanwhile holds the handle, too
        self.asked.close()
        self.process.wait()


_servers: dict[Any, Server] = {}
_MOST = 2  # of them at a time: each holds some 400 MB


def _server(environment: tuple[tuple[str, str], ...], modules: tuple[str, ...]) -> Server:
    """The server of this environment, started where there is none; the one that was asked longest ago ends for it."""
    server = _servers.pop((environment, modules), None) or Server(dict(environment), modules)
    _servers[environment, modules] = server
    while len(_servers) > _MOST:
        _servers.pop(next(iter(_servers))).close()
    return server


class Popen(_Process):  # type: ignore[type-arg]
    """`subprocess.Popen` of this interpreter, forked: it takes -W, and -c, -m or a script.

    Where the process would have more threads than one, or the system knows no subreaper, it is a new interpreter.

    Args:
        words: as ever.
        terminal: whether standard input becomes its controlling terminal; it needs `start_new_session`.
        modules: what the process that forks has imported.
        options: as ever; no `preexec_fn`, no `pass_fds`.
    """

    def __init__(
        self, words: Any, *, terminal: bool = False, modules: tuple[str, ...] = MODULES, **options: Any
    ) -> None:
        self._terminal, self._modules = terminal, modules
        super().__init__([str(word) for word in words], **options)

    def _execute_child(self, *given: Any) -> None:
        real = super()._execute_child  # type: ignore[misc]
        said = inspect.signature(real).bind(*given).arguments
        environment = {k: str(v) for k, v in (os.environ if said["env"] is None else said["env"]).items()}
        if environment.get("OMP_NUM_THREADS") != "1" or not sys.platform.startswith("linux"):
            if self._terminal:
                given = tuple({**said, "preexec_fn": take_terminal}.values())
            return real(*given)
        assert said["args"][0] == sys.executable and not (said["preexec_fn"] or said["pass_fds"] or said["shell"])
        fixed = tuple(sorted((k, v) for k, v in environment.items() if k not in FREE))
        request = {
            "words": said["args"][1:],
            "environment": environment,
            "folder": str(said["cwd"] or Path.cwd()),
            "session": said["start_new_session"],
            "terminal": self._terminal,
        }
        streams = [said[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        handles = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        try:
            self.pid = _server(fixed, self._modules).fork(request, handles)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(said[n] for n in _PIPES))  # type: ignore[attr-defined]


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


def take_terminal() -> None:
    """Make standard input the terminal that controls this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def run(words: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` by `Popen` above."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(words, **options)
