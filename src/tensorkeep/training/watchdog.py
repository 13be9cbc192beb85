"""Notice that a run does not get on, write down where every thread of every process stands, and end them all.

A process says what it is at (`at`, `doing`); each word is progress. While it builds, starts, compiles, fetches data,
saves or evaluates, whatever computes, reads or writes is progress too. A thread beside the training looks now and then;
it holds up nothing, and needs no collective. Where no process of a run has got on for a time, or one has not answered
for as long, each that still can writes its stacks into the run's folder, the words say what each was at, and all leave
with exit code 75, so that a launcher starts them again or ends. Where a process of the run is gone without having
left, the others do not wait so long: they end once none of them has got on for a few seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tensorkeep.errors import TEMPORARY, TensorkeepError
from tensorkeep.output import Output
from tensorkeep.training import interruption
from tensorkeep.training.status import ended

if TYPE_CHECKING:
    from tensorkeep.training._heartbeats import Heartbeats, Standing

STACKS = "stacks"
_MOST, _ANSWER = 5.0, 0.3  # seconds: between two looks, at most; that workers take to write their stacks
_GRACE = 5.0  # seconds, at most, that a process may still get on with, when another of the run is gone
_SHARE, _BYTES = 0.05, 1 << 20  # of a core, and bytes between two looks: less is no work
_numbers = itertools.count()


class _Now(NamedTuple):
    """What a process is at: words, the step they are about, and whether computing counts as getting on."""

    words: str
    step: int | None
    busy: bool


class Watch:
    """Watches one process, and with the others of a run the run; made by `watching`."""

    def __init__(self, folder: Path, rank: int, ranks: int, limit: float, json: bool = False) -> None:
        self.folder, self.rank, self.ranks, self.limit, self.json = folder, rank, ranks, limit, json
        self.every = min(_MOST, limit / 8)
        self.now, self.count = _Now("start", None, True), 0
        self._progress = self._answered = time.monotonic()
        self._good = True
        self._over, self._ring = threading.Event(), threading.Event()
        self._beats: Heartbeats | None = None
        self._of_workers = tempfile.TemporaryFile()  # noqa: SIM115
        interruption.stacks_go_to(self._of_workers)
        self._threads = [threading.Thread(target=self._look, name="tensorkeep-watch", daemon=True)]
        if ranks > 1:
            from tensorkeep.training._heartbeats import Heartbeats

            self._beats = Heartbeats(str(next(_numbers)), rank, ranks, limit, self.every)
            self._threads.append(threading.Thread(target=self._beat, name="tensorkeep-beat", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self, good: bool = True) -> None:
        """Watch no more; the others hear whether this process leaves in `good` order."""
        self._good = good
        self._over.set()
        self._ring.set()
        for thread in self._threads:
            thread.join(2.0)  # the store may not answer
        interruption.stacks_go_to(None)
        self._of_workers.close()

    # -- the two threads ----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Tell the others how this process stands, and hear of them."""
        from tensorkeep.training._heartbeats import Standing

        beats = self._beats
        while beats is not None and not beats.lost:
            over = self._over.is_set()
            beats.round(Standing(self._words(), time.monotonic() - self._progress, left=over and self._good))
            self._answered = time.monotonic()
            if beats.verdict is not None:
                self._ring.set()
            if over or beats.verdict is not None:
                return
            self._over.wait(self.every)

    def _look(self) -> None:
        """Note whether this process gets on, and end it where that is due."""
        count, spent, last = -1, used(), time.monotonic()
        while not self._over.is_set():
            self._ring.wait(self.every)
            now = time.monotonic()
            if self._over.is_set():
                return
            if now - last > 4 * self.every + 1:  # it was stopped (Ctrl-Z, a debugger): no time has passed for it
                self._progress, self._answered = self._progress + now - last, self._answered + now - last
                if self._beats is not None:
                    self._beats.shift(now - last)
            before, spent = spent, used()
            worked = spent[0] - before[0] > _SHARE * (now - last) or spent[1] - before[1] > _BYTES
            if count != self.count or (self.now.busy and worked):
                count, self._progress = self.count, now
            last = now
            if (why := self._why(now)) is not None:
                self._end(why)

    def _why(self, now: float) -> str | None:
        """Why this process is to end, None where it is not."""
        beats = self._beats
        first = beats.known.get(0) if beats is not None and self.rank else None
        gone = None if beats is None else beats.gone
        if first is not None and beats is not None and beats.lost and beats.ended(0):  # the store went with it
            gone = f"rank 0 on {first.host}"
        if gone is not None and now - self._progress > min(_GRACE, self.limit / 2):
            return f"the process of {gone} is gone"
        if beats is None or beats.lost or (first is not None and first.left):
            idle = now - self._progress
            return f"has not got on for {idle:.0f} s" if idle > self.limit else None
        if beats.verdict is not None:
            return beats.verdict
        if now - self._answered > self.limit:
            return f"the processes' store has not answered for {now - self._answered:.0f} s{self._first()}"
        if first is not None and now - first.seen > self.limit:
            return f"rank 0 on {first.host} has not answered for {now - first.seen:.0f} s{self._first()}"
        return None

    def _first(self) -> str:
        """What the first rank was at when it was last heard of."""
        first = self._beats.known.get(0) if self._beats is not None and self.rank else None
        return "" if first is None else f" (last heard of on {first.host}, at {first.phase})"

    def _words(self) -> str:
        """What this process is at."""
        return self.now.words if self.now.step is None else f"{self.now.words} {self.now.step}"

    # -- the end ------------------------------------------------------------------------------------------------------

    def _end(self, why: str) -> None:
        """Write stacks, say why, and leave."""
        own, idle = self._words(), time.monotonic() - self._progress
        trouble = self._write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {why}; at {own} for {idle:.0f} s")
        beats, say = self._beats, Output(json=self.json and self.rank == 0)
        known = dict(beats.known) if beats is not None and self.rank == 0 else {}
        lines = [f"rank {self.rank}: at {own}, for {idle:.0f} s; {trouble or f'stacks in {self._stacks(self.rank)}'}"]
        if known:
            lines = [self._line(rank, known) for rank in range(self.ranks)]
        hint = "the same command goes on from the newest checkpoint; training.watchdog says how long to wait"
        if not self.rank or (beats is not None and beats.verdict is None):  # else the first rank says it all
            for line in lines:
                say.remark(line)
            say.error(TensorkeepError(why, where=self.folder, hint=hint))
        if not self.rank:
            ended(self.folder, why, hint)
        end = time.monotonic() + 2 * self.every + 4.0
        while beats is not None and not self.rank and time.monotonic() < end:
            if beats.told or beats.lost or beats.gone is not None:
                break
            time.sleep(self.every / 20)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(TEMPORARY)

    def _line(self, rank: int, known: dict[int, Standing]) -> str:
        """What the first rank knows of one."""
        standing = known.get(rank)
        if standing is None:
            return f"rank {rank}: never heard of"
        age = time.monotonic() - standing.seen
        if standing.left:
            return f"rank {rank} on {standing.host}: had left in good order"
        if self._beats is not None and self._beats.gone is not None and self._beats.ended(rank):
            return f"rank {rank} on {standing.host}: its process is gone, last heard of at {standing.phase}; no stacks"
        if age > self.limit:
            return f"rank {rank} on {standing.host}: last heard of {age:.0f} s ago, at {standing.phase}; no stacks"
        place = f"stacks in {self._stacks(rank)}"
        return f"rank {rank} on {standing.host}: at {standing.phase}, for {standing.idle + age:.0f} s; {place}"

    def _stacks(self, rank: int) -> Path:
        return self.folder / STACKS / f"rank-{rank:04}.txt"

    def _write(self, head: str) -> str:
        """Append the stacks of all threads to this rank's file; says why where that fails."""
        path = self._stacks(self.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{head}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(f"\n{self._asked()}")
        except OSError as error:
            return f"its stacks could not be written: {error.strerror or error}"
        return ""

    def _asked(self) -> str:
        """Return the stacks of the processes that fetch data, and end those: a stuck one would outlive this one."""
        living = {child.pid for child in multiprocessing.active_children()}
        asked = [pid for pid in interruption.helpers(self._of_workers) if pid in living]
        for number, pause in ((interruption.STACKS, _ANSWER), (signal.SIGKILL, 0.0)):
            for pid in asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(pause if asked else 0.0)
        self._of_workers.seek(0)
        told = self._of_workers.read().decode(errors="replace")
        return f"processes that fetch data ({len(asked)}):\n{told}\n" if asked else ""


_current: Watch | None = None


@contextlib.contextmanager
def watching(folder: str | Path, rank: int, ranks: int, limit: float | None, json: bool = False) -> Iterator[None]:
    """Watch this process, and with the others of its group the run, while the body runs; within another watch, nothing.

    Args:
        folder: the run's folder; stacks go to `stacks/rank-0000.txt` in it.
        rank: of this process.
        ranks: how many there are; every one must come here.
        limit: seconds without progress, or without an answer, after which all processes are ended; None: no watch.
        json: whether the error is a document on stdout as well.

    Yields:
        Nothing.
    """
    global _current
    if limit is None or _current is not None:
        yield
        return
    _current = Watch(Path(folder), rank, ranks, limit, json)
    watch, good = _current, False
    try:
        yield
        good = True
    finally:
        _current = None
        watch.stop(good)


def at(words: str, step: int | None = None, busy: bool = False) -> None:
    """Say what this process is at now, which is progress.

    Args:
        words: what.
        step: the step that it is about.
        busy: whether to compute, read or write is progress from here on; else only the next word is.
    """
    watch = _current
    if watch is not None:
        watch.now = _Now(words, step, busy)
        watch.count += 1


@contextlib.contextmanager
def doing(words: str, step: int | None = None) -> Iterator[None]:
    """Say that this process is at something that may take long, and then that it is where it was.

    Args:
        words: what.
        step: the step that it is about.

    Yields:
        Nothing; to compute, read or write is progress.
    """
    before = _current.now if _current is not None else None
    at(words, step, busy=True)
    try:
        yield
    finally:
        if before is not None:
            at(*before)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within it a compilation by torch is `doing` something; where torch does not tell of its beginning, nothing.

    Yields:
        Nothing.
    """
    try:
        from torch._dynamo.callback import callback_handler as handler

        add, remove = handler.register_start_callback, handler.remove_start_callback
        add_end, remove_end = handler.register_end_callback, handler.remove_end_callback
    except (ImportError, AttributeError):
        yield
        return
    open_ones: list[contextlib.AbstractContextManager[None]] = []

    def start(*_: object) -> None:
        open_ones.append(doing("compilation"))
        open_ones[-1].__enter__()

    def end(*_: object) -> None:
        if open_ones:
            open_ones.pop().__exit__(None, None, None)

    add(start)
    add_end(end)
    try:
        yield
    finally:
        remove(start)
        remove_end(end)


def used() -> tuple[float, int]:
    """Measure what this process and those it started have used.

    Returns:
        Seconds of processors, and bytes read and written; 0 bytes where the system does not say.
    """
    seconds, count = time.process_time(), 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/io").read_text().splitlines():
            name, _, value = line.partition(": ")
            count += int(value) if name in ("rchar", "wchar", "read_bytes", "write_bytes") else 0
    return seconds + sum(map(_seconds, _children(os.getpid()))), count


def _children(pid: int, deep: int = 3) -> Iterator[int]:
    """Processes that one started, and that those did."""
    try:
        found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return
    for child in found:
        yield child
        if deep:
            yield from _children(child, deep - 1)


def _seconds(pid: int) -> float:
    """Seconds of processors that a process has used; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
