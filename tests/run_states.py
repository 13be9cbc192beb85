"""Make states of a run for the tests of checkpoints, and let the system's calls fail or kill the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tensorkeep.training.saver import State


def state(step: int, *, size: int = 32, ema: bool = True) -> State:
    """A small state whose every value follows from the step."""
    generator = torch.Generator().manual_seed(step)
    model = {
        "layers.0.w": torch.randn(size, size, generator=generator),
        "layers.0.b": torch.randn(size, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(step),
    }
    trained = ("layers.0.w", "layers.0.b")
    moments = {f"{n}/{s}": torch.rand(model[n].shape, generator=generator) for n in trained for s in ("m", "v")}
    document = {"step": step, "samples": 8 * step, "epoch": 0, "world_size": 1, "rng": {"torch": "00ff"}}
    return State(model, moments, {n: model[n].float() for n in trained} if ema else {}, document)


def same(one: State, other: State) -> bool:
    """Whether two states are equal, bit for bit."""
    return (
        all(equal(getattr(one, part), getattr(other, part)) for part in ("model", "optimizer", "ema"))
        and one.document == other.document
        and (one.base, one.not_captured) == (other.base, other.not_captured)
    )


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(identical(one[n], other[n]) for n in one)


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaN equals itself)."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


CALLS = (
    "open",
    "mkdir",
    "write",
    "pwrite",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "rename",
    "link",
    "unlink",
    "rmdir",
)


class Faults:
    """Counts the system's calls of a save; at number `at` (from 1) it does `act`, before the call or after it."""

    def __init__(self, at: int = 0, act: Callable[[], None] | None = None, after: bool = False) -> None:
        self.at, self.act, self.after = at, act, after
        self.calls: list[tuple[str, str]] = []  # name, path
        self._lock = threading.Lock()

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.calls.append((name, place(args[0])))
                due = len(self.calls) == self.at
            if due and not self.after and self.act:
                self.act()
            try:
                return real(*args, **kwargs)
            finally:
                if due and self.after and self.act:
                    self.act()

        return called


def place(given: object) -> str:
    return str(Path(f"/proc/self/fd/{given}").readlink()) if type(given) is int else os.fspath(given)  # type: ignore[call-overload]


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """The calls of `CALLS` go through `faults` inside."""
    real = {name: getattr(os, name) for name in CALLS}
    try:
        for name, call in real.items():
            setattr(os, name, faults.wrap(name, call))
        yield faults
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit status (0 when it came to the end, 9 where a fault killed it)."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
