"""Ctrl-C, SIGTERM and SIGHUP end a command in one way: as an exception, so that what it was writing is cleaned up.

The command line listens (`answered`); a program that uses the package keeps its own handlers. What must not be cut in
two, such as putting a file and its certificate in their places, is done within `held()`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """What the handler knows; there is one handler for the whole process."""

    process = 0  # that listens; a child inherits the handler
    depth = 0  # of `held` bodies
    waiting: int | None = None  # a signal that came in one of them
    ended = False


_state = _State()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Raise Ended in the main thread when one of these signals comes; the former handlers come back afterwards.

    A signal that is ignored stays so (nohup). Once one was raised, further SIGTERMs and SIGHUPs are let pass, so that
    cleaning up is not interrupted; a further Ctrl-C interrupts it.

    Yields:
        Nothing; the signals are answered while the body runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    mine = [number for number in ENDING if signal.getsignal(number) in usual]
    _state.process, _state.depth, _state.waiting, _state.ended = os.getpid(), 0, None, False
    before = {number: signal.signal(number, _answer) for number in mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answer(number: int, _frame: FrameType | None) -> None:
    """Do what a signal asks for, at once or when the body of `held` is done."""
    if os.getpid() != _state.process:  # a process that was forked: it ends as it would have
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _state.depth:
        _state.waiting = number if _state.waiting is None else _state.waiting
    elif not _state.ended or number == signal.SIGINT:
        _state.ended = True
        raise Ended(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let a signal that comes in the body wait until it is done.

    Yields:
        Nothing.

    Raises:
        Ended: one came; raised when the body is over, however it went.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are never raised here
        return
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        if not _state.depth and _state.waiting is not None:
            number, _state.waiting = _state.waiting, None
            _answer(number, None)
