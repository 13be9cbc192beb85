"""How the processes of a run tell each other that they live and get on, without a collective.

Each one now and then leaves a few words in the store of their group; the first one reads them all, and leaves one note
that all others read. Ages are measured by the clock of whoever waits, so clocks may differ. A store may stop answering
together with the process that keeps it: `Heartbeats.round` may then never return, and is called in a thread of its own.

A process that was killed breaks its connections under gloo; under NCCL the others wait on, within a kernel. So each
looks whether the process of its neighbour on the same host is still there, and leaves a note for all where it is not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

_STAY = 2.0  # seconds, and two rounds: how long the first process stays for the others to hear that all is over


@dataclass
class Standing:
    """How a process stood when it was last heard of.

    Args:
        phase: what it was at.
        idle: seconds since it had got on.
        host: where it runs.
        left: whether it has left the run in good order.
        process: which process of which system it is, as `process` says; empty where the system does not tell.
        number: of its note.
        seen: when that note was first seen, by the reader's clock.
    """

    phase: str
    idle: float
    host: str = field(default_factory=socket.gethostname)
    left: bool = False
    process: str = field(default_factory=lambda: process(os.getpid()))
    number: int = 0
    seen: float = 0.0


class Heartbeats:
    """The notes of one watch; made by every rank of the group in the same order.

    Args:
        name: of the watch, never used before in this group.
        rank: of this process.
        ranks: how many there are.
        limit: seconds without a note, or without any rank getting on, after which all is over.
        every: seconds between two rounds.

    Attributes:
        known: what was heard of each rank; on other ranks than the first, of the first and of the neighbour.
        verdict: why all is over, None while it is not.
        gone: which rank's process is not there any more, though it has not left the run; None: of none that is known.
        told: whether the others have heard the verdict.
        lost: whether the store can no longer be asked.
    """

    def __init__(self, name: str, rank: int, ranks: int, limit: float, every: float) -> None:
        store: Any = distributed_c10d._get_default_store()
        if hasattr(store, "clone"):  # a connection of its own: waiting for others on the shared one would hold this up
            store = store.clone()
        self._store, self._number = PrefixStore(f"tensorkeep/watch/{name}", store), 0
        self.rank, self.ranks, self.limit, self.every = rank, ranks, limit, every
        self.known: dict[int, Standing] = {}
        self.verdict: str | None = None
        self.gone: str | None = None
        self.told = self.lost = False
        here, local = (int(os.environ.get(k, d)) for k, d in (("LOCAL_WORLD_SIZE", ranks), ("LOCAL_RANK", rank)))
        self._neighbour = rank - local + (local + 1) % here if 0 <= local < here <= ranks else (rank + 1) % ranks

    def round(self, own: Standing) -> None:
        """Leave this rank's note, read the others', and on the first rank judge; may take for ever.

        Args:
            own: how this process stands.
        """
        self._number += 1
        words = [self._number, own.phase, own.idle, own.host, own.left, own.process]
        try:
            if self.rank == 0:
                self._read(range(1, self.ranks))
                self.known[0] = replace(own, number=self._number, seen=time.monotonic())
                self.verdict = judged(self.known, self.ranks, self.limit, time.monotonic())
                self._store.set("rank/0", json.dumps([*words, self.verdict]))
                if self.verdict is not None:
                    self._wait_for_ears()
            else:
                self._store.set(f"rank/{self.rank}", json.dumps([*words, None]))
                verdict = self._read([0])
                if verdict is not None and self.verdict is None:
                    self._store.add("heard", 1)
                    self.verdict = verdict
            if self.verdict is None:
                self._look_beside()
        except RuntimeError:  # it was a part of a process that is gone
            self.lost = True

    def _read(self, ranks: Any) -> str | None:
        """Read notes; gives the verdict that the last one carries."""
        verdict = None
        for rank in ranks:
            key = f"rank/{rank}"
            if rank not in self.known and not self._store.check([key]):
                continue
            number, phase, idle, host, left, which, verdict = json.loads(self._store.get(key))
            if rank not in self.known or self.known[rank].number != number:
                self.known[rank] = Standing(phase, idle, host, left, which, number, time.monotonic())
        return verdict

    def _look_beside(self) -> None:
        """Tell all where the neighbour's process is gone, and hear of others that are."""
        if self.gone is not None:
            return
        self._read([self._neighbour])
        if self.ended(self._neighbour):
            self._read([self._neighbour])  # its last note may say that it has left
            if self.ended(self._neighbour):
                self._store.set("gone", f"rank {self._neighbour} on {self.known[self._neighbour].host}")
        if self._store.check(["gone"]):
            self.gone = self._store.get("gone").decode()

    def ended(self, rank: int) -> bool:
        """Whether a rank's process, once of this system, is there no more, though the rank has not left the run.

        Args:
            rank: whose; of one that was never heard of nothing is known.
        """
        standing = self.known.get(rank)
        if standing is None or standing.left or not standing.process:
            return False
        system, _, number = standing.process.rpartition(" ")[0].rpartition(" ")
        return process(os.getpid()).startswith(f"{system} ") and process(int(number)) != standing.process

    def _wait_for_ears(self) -> None:
        """Stay until the ranks that answer have heard the verdict: the store may be a part of this process."""
        now = time.monotonic()
        living = sum(not s.left and now - s.seen <= self.limit for rank, s in self.known.items() if rank)
        end = now + 2 * self.every + _STAY
        while self._store.add("heard", 0) < living and time.monotonic() < end:
            time.sleep(self.every / 20)
        self.told = True

    def shift(self, seconds: float) -> None:
        """Take no account of a time in which this process itself was stopped."""
        for standing in list(self.known.values()):
            standing.seen += seconds


def process(pid: int) -> str:
    """Name a process so that no other has its name: its system, its number and when it began.

    Args:
        pid: its number.

    Returns:
        The kernel's start and the namespace of numbers, the number, and ticks; empty where there is no such process,
        where it has ended and is not yet waited for, or where the system has no /proc.
    """
    try:
        system = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
        state, *_, born = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except (OSError, ValueError):
        return ""
    return "" if state in "ZXx" else f"{system} {pid} {born}"


def judged(known: dict[int, Standing], ranks: int, limit: float, now: float) -> str | None:
    """Say why all is over, from what is known of each rank; None while it is not.

    Args:
        known: by rank; one that was never heard of is still on its way, and its launcher looks after it.
        ranks: how many there are.
        limit: seconds.
        now: the time, by the clock of `Standing.seen`.

    >>> judged({0: Standing("update 3", 9.0, "a", seen=0.0), 1: Standing("data of update 3", 9.5, "b")}, 2, 8.0, 1.0)
    'no process has got on for 10 s'
    >>> judged({0: Standing("update 3", 0.1, "a", seen=9.0), 1: Standing("update 3", 0.1, "b", seen=0.5)}, 2, 8.0, 9.0)
    'rank 1 on b has not answered for 8 s'
    """
    here = {rank: standing for rank, standing in known.items() if not standing.left}
    silent = [rank for rank, standing in here.items() if now - standing.seen > limit]
    if silent:
        names = ", ".join(f"rank {rank} on {here[rank].host}" for rank in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        since = max(now - here[rank].seen for rank in silent)
        return f"{names}{more} {'has' if len(silent) == 1 else 'have'} not answered for {since:.0f} s"
    idle = [standing.idle + now - standing.seen for standing in here.values()]
    if len(known) == ranks and idle and min(idle) > limit:
        return f"no process has got on for {min(idle):.0f} s"
    return None
