"""A process that has imported what the programs of tests import, and forks one of them whenever it is asked.

`tests.forked` starts it and asks over a socket: a request is a length, JSON and the three handles of standard input,
output and error; the answer is the process's number. It imports only: nothing is computed here, and no thread is
started, so that a fork is as good as a new interpreter. The new process is handed to the one that asked (its
"subreaper"), which waits for it as for any child of its own.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import termios
import time
import types
import warnings
from pathlib import Path
from typing import Any

# what `tensorkeep train` and the ranks of tests import, much of it late; of tensorkeep nothing: each process imports
# that itself, in 0.15 s
MODULES = (
    *("torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers", "peft"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
)
# what a process may have otherwise than the one that it is forked from: no module above reads these when imported
FREE = frozenset("PYTEST_CURRENT_TEST PYTHONPATH TERM PAUSE RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split())


def received(asked: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request and its handles; None where nobody will ask again."""
    head, handles, _, _ = socket.recv_fds(asked, 8, 3, socket.MSG_WAITALL)
    if not head:
        return None
    length, body = int.from_bytes(head, "little"), b""
    while len(body) < length and (piece := asked.recv(length - len(body))):
        body += piece
    return json.loads(body), handles


def detached(asked: socket.socket) -> bool:
    """Fork a process whose parent is the one that asked; whether this is the new process."""
    read, write = os.pipe()
    if (between := os.fork()) == 0:
        parent = os.getpid()
        if (child := os.fork()) == 0:
            for handle in (read, write):
                os.close(handle)
            asked.close()
            while os.getppid() == parent:
                time.sleep(0.0005)
            return True
        os.write(write, child.to_bytes(8, "little"))
        os._exit(0)
    os.close(write)
    os.waitpid(between, 0)  # with it gone the new process is a child of the one that asked
    asked.sendall(os.read(read, 8))
    os.close(read)
    return False


def stand(request: dict[str, Any], handles: list[int]) -> None:
    """Give this process its streams, folder, environment, session and random numbers, as a start would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if request["folder"]:
        os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if (numpy := sys.modules.get("numpy")) is not None:  # Python's own generator is seeded anew by every fork
        numpy.random.seed()


def start(words: list[str], base: list[str]) -> None:
    """Do what `python WORDS` does: options -W, and -c, -m or a script.

    Args:
        words: after the interpreter's own name.
        base: `sys.path` without what PYTHONPATH and the program add.
    """
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    while words[0] == "-W":
        sys.warnoptions.append(words[1])
        warnings._processoptions([words[1]])  # type: ignore[attr-defined]
        words = words[2:]
    kind, rest = (words[0], words[2:]) if words[0] in ("-c", "-m") else ("", words[1:])
    first = {"-c": "", "-m": str(Path.cwd())}.get(kind, str(Path(words[0]).resolve().parent))
    sys.path[:] = [first, *given, *base]
    sys.argv[:] = [kind or words[0], *rest]
    if kind == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    """Import, and serve until nobody asks; every new process ends as its program does."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    base = [p for p in sys.path[1:] if p not in given]
    sys.path[:1] = [str(Path(__file__).parents[1])]
    gc.disable()
    for name in json.loads(sys.argv[2]):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # nothing that was imported is looked at, and so copied, in a new process
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for those who asked
    while (found := received(asked)) is not None:
        request, handles = found
        threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
        assert threads == 1, f"{threads} threads: a fork would lose them"
        if detached(asked):
            stand(request, handles)
            return start(request["words"], base)
        for handle in handles:
            os.close(handle)


if __name__ == "__main__":
    main()
