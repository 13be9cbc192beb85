"""Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask a run to save and leave; asked twice, it leaves at once.

A handler only notes the wish: an update is never cut in half. Within `may_stop()` (an evaluation, which changes
nothing) it raises instead, since the checkpoint before it has been saved already.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from tensorkeep.output import end_line

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STACKS = signal.SIGUSR2  # to a process that fetches data, by the one that it works for
ECHO = 1.0  # seconds; a terminal and a launcher both pass the same wish on, which is not asking twice

_stacks: IO[bytes] | None = None


class Interrupted(BaseException):
    """A signal came where the run may stop at once.

    It is no Exception: an evaluation that guards itself against faults in its data must not swallow it.
    """


class Wish:
    """Whether the run was asked to stop, and by which signal (`signal`, None where it was not)."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._may_stop = False

    @contextmanager
    def may_stop(self) -> Iterator[None]:
        """Within it a signal raises Interrupted; one that came before does so at once, too."""
        self._may_stop = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._may_stop = False

    def ask(self, number: int, _frame: FrameType | None = None) -> None:
        """Note a signal, as its handler."""
        if self.signal is not None:
            if time.monotonic() - self._since > ECHO:
                end_line()
                os._exit(128 + number)  # half-written files bear a temporary name: nothing is lost by leaving now
            return
        self.signal, self._since = number, time.monotonic()
        if self._may_stop:
            raise Interrupted


@contextmanager
def listening() -> Iterator[Wish]:
    """Within it the signals that ask a run to stop are noted; the former handlers come back afterwards.

    Outside the main thread Python cannot listen, and the wish stays empty.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup: it goes on without the terminal
    asking = [number for number in ASKING if number != signal.SIGHUP or not hung_up]
    before = {number: signal.signal(number, wish.ask) for number in asking}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            # None: it was set outside Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_to_the_parent() -> None:
    """Ignore the signals that ask a run to stop, and write stacks at STACKS; for a process that fetches data.

    A terminal or Slurm sends a signal to the whole group of processes. The run, still finishing its update, needs the
    samples, and ends its helpers itself.
    """
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    if _stacks is not None:
        faulthandler.register(STACKS, file=_stacks, all_threads=True)
        os.write(_stacks.fileno(), f"process {os.getpid()}\n".encode())


def stacks_go_to(file: IO[bytes] | None) -> None:
    """Say where processes that fetch data, made from here on, write their stacks when they are sent STACKS.

    Args:
        file: open for writing; None: they do not listen.
    """
    global _stacks
    _stacks = file


def helpers(file: IO[bytes]) -> list[int]:
    """Read which processes said in this file that they listen for STACKS.

    Args:
        file: as `stacks_go_to` was given it.

    Returns:
        Their numbers; some may have ended.
    """
    file.seek(0)
    return [int(line.split()[1]) for line in file.read().splitlines() if re.fullmatch(rb"process \d+", line)]
