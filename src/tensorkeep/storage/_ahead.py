"""Reading ahead in a store: bytes that are read one after the other come in large ranges, several at a time.

What is asked for first is fetched as it was asked for, and what is announced (`expect`) in parts, a few of them before
they are asked for. Where reading goes on from there, each range is as long as what was read in one go so far, up to a
part, and as much is fetched before it is asked for, up to a few parts. So who reads here and there pays for what it
reads, and who reads a file from end to end needs few requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

PART = 32 << 20  # most bytes of one request
AHEAD = 3  # parts that are fetched before they are asked for
_HELD = 6 * PART  # bytes held in all: parts under way, and parts not yet read to their end
_RUNS = 32  # places of one file at which reading goes on


class _Part:
    """A range that is under way or here."""

    def __init__(self, start: int, end: int, data: Future[bytes | bytearray]) -> None:
        self.start, self.end, self.data = start, end, data
        self.left = end - start  # bytes that nobody took yet


class _Run:
    """A stretch of a file that is read in one go, by one thread or by several."""

    def __init__(self, start: int) -> None:
        self.low = self.high = start
        self.taken = 0  # bytes read so far
        self.sure = start  # end of what was announced
        self.going = True  # reading went on beyond what was announced, or nothing was
        self.used = 0  # number of the last read of it
        self.parts: list[_Part] = []


class Ahead:
    """Gives byte ranges of the files of a store, fetched ahead where reading is sequential.

    Args:
        fetch: called as `fetch(name, start, length)`, gives the bytes or raises.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes | bytearray]) -> None:
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(AHEAD + 1, thread_name_prefix="tensorkeep-ahead")
        self._runs: dict[str, list[_Run]] = {}
        self._lock = threading.Lock()
        self._held = self._reads = 0

    def close(self) -> None:
        """Let go of what is held and ask for nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def expect(self, name: str, start: int, length: int) -> None:
        """Take note that a range is going to be read from its first byte to its last."""
        with self._lock:
            known = len(self._runs.get(name, ()))
            run = self._run(name, start)
            run.going = len(self._runs[name]) == known
            run.sure = max(run.sure, start + length)

    def read_into(self, name: str, start: int, buffer: memoryview, size: int) -> None:
        """Fill `buffer` from byte `start` of a file of `size` bytes; the range lies within it."""
        end = start + len(buffer)
        with self._lock:
            run = self._run(name, start)
            wanted = self._wanted(name, run, start, end)
            self._go_on(name, run, start, end, size)
            run.taken += len(buffer)
        for low, high, part in wanted:
            target = buffer[low - start : high - start]
            if part is None:
                target[:] = self._fetch(name, low, high - low)
                continue
            try:
                target[:] = memoryview(part.data.result())[low - part.start : high - part.start]
            except BaseException:
                part.left = 0
                raise
            finally:
                with self._lock:
                    part.left -= len(target)
                    if part.left <= 0:
                        self._drop(part)

    def _run(self, name: str, start: int) -> _Run:
        """Return the run that a read belongs to, or begin one."""
        runs = self._runs.setdefault(name, [])
        run = next((r for r in runs if r.low <= start <= r.high), None)
        if run is None:
            run = _Run(start)
            runs.append(run)
            idle = [r for r in runs if not r.parts and r is not run]
            if len(runs) > _RUNS and idle:
                runs.remove(min(idle, key=lambda r: r.used))
        self._reads += 1
        run.used = self._reads
        return run

    def _wanted(self, name: str, run: _Run, start: int, end: int) -> list[tuple[int, int, _Part | None]]:
        """Say from which part each stretch of a read comes; None where it is fetched by itself."""
        while run.high < end and run.high < (limit := self._limit(name, run, max(end, run.sure))):
            self._submit(name, run, min(limit, run.high + PART))
        found: list[tuple[int, int, _Part | None]] = []
        at = start
        for part in sorted(run.parts, key=lambda p: p.start):
            if part.end <= at or part.start >= end:
                continue
            if part.start > at:
                found.append((at, part.start, None))
            low, at = max(at, part.start), min(part.end, end)
            found.append((low, at, part))
        if at < end:
            found.append((at, end, None))
        return found

    def _go_on(self, name: str, run: _Run, start: int, end: int, size: int) -> None:
        """Fetch what is likely to be asked for next: nothing at a run's first read, more the longer it is."""
        run.low = min([run.high, *(p.start for p in run.parts)])
        while run.high < (limit := self._limit(name, run, size)):
            length, most = min(max(run.taken, end - start), PART), min(run.taken, AHEAD * PART) if run.going else 0
            if run.high < run.sure:
                length, most = min(run.sure - run.high, PART), AHEAD * PART
            self._make_room(length, run, start)
            if run.high - end >= most or self._held + length > _HELD:
                return
            self._submit(name, run, min(limit, run.high + length))

    def _limit(self, name: str, run: _Run, end: int) -> int:
        """Return where a run may go on to: up to the next one, with which it is joined when it gets there."""
        for other in [r for r in self._runs[name] if r is not run and r.low == run.high]:
            run.parts += other.parts
            run.high, run.taken = max(run.high, other.high), run.taken + other.taken
            run.sure, run.going = max(run.sure, other.sure), True
            self._runs[name].remove(other)
        return min([end, *(r.low for r in self._runs[name] if r is not run and r.low > run.high)])

    def _submit(self, name: str, run: _Run, end: int) -> None:
        data = self._pool.submit(self._fetch, name, run.high, end - run.high)
        run.parts.append(_Part(run.high, end, data))
        self._held += end - run.high
        run.high = end

    def _make_room(self, length: int, run: _Run, start: int) -> None:
        """Drop what was fetched and seems to be wanted no more, the longest unused first."""
        runs = sorted((r for runs in self._runs.values() for r in runs if r is not run), key=lambda r: r.used)
        old = [p for r in runs for p in r.parts] + [p for p in run.parts if p.end <= start]
        for part in old:
            if self._held + length <= _HELD:
                return
            if part.data.done():
                self._drop(part)

    def _drop(self, part: _Part) -> None:
        for runs in self._runs.values():
            for run in runs:
                if part in run.parts:
                    run.parts.remove(part)
                    self._held -= part.end - part.start
