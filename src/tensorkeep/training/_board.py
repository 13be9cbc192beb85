"""Notes that ranks leave for each other in the store of their group, so that none waits in a collective.

A collective ends with its group's time-out, half an hour by default, and takes the job with it. A note is looked for
now and then, for as long as the caller says, and who did not leave one is named. A process of this host that is gone is
not waited for.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from tensorkeep.errors import TEMPORARY, TensorkeepError

TIMEOUT = 1800.0  # seconds
_OFTEN, _SELDOM = 0.002, 0.25  # seconds between looks, at most: the first ones, and of hundreds of ranks
_HEARD = 60.0  # seconds; how long the first rank stays for the others to hear it
_PART = 4 << 20  # bytes; a store takes values of up to 8 MiB
_GRACE = 1.0  # seconds; how long the others may take to hear the first rank where one of them is gone


class Board:
    """The notes of one meeting of ranks.

    Args:
        name: of the meeting, the same on every rank, and never used before in this group.
        rank: of this process, from 0.
        ranks: how many there are.
        timeout: seconds that one waits for another.
    """

    def __init__(self, name: str, rank: int, ranks: int, timeout: float = TIMEOUT) -> None:
        self.name, self.rank, self.ranks, self.timeout = name, rank, ranks, timeout
        self._store = None
        self._near: dict[str, int | None] = {}  # processes of this host, by rank; None of others
        if ranks > 1:
            self._store = PrefixStore(f"tensorkeep/{name}", distributed_c10d._get_default_store())
            part = (
                "" if ranks == distributed_c10d.get_world_size() else name
            )  # ranks of a part have numbers of their own
            self._processes = introduced(rank, part)

    def post(self, key: str, note: bytes) -> None:
        """Leave a note that any rank may read."""
        if self._store is not None:
            parts = [note[at : at + _PART] for at in range(0, len(note), _PART)]
            for number, part in enumerate(parts):
                self._store.set(f"{key}/{number}", part)  # type: ignore[arg-type]
            self._store.set(key, str(len(parts)))

    def read(self, key: str) -> bytes:
        """Read a note that is there, and take it away."""
        assert self._store is not None
        count = int(self._store.get(key))
        note = b"".join(self._store.get(f"{key}/{number}") for number in range(count))
        for number in range(count):
            self._store.delete_key(f"{key}/{number}")
        return note

    def wait(self, keys: Sequence[str], missing: Callable[[Sequence[str]], str]) -> None:
        """Wait until notes are there; the store is asked anew each time, so other threads may use it meanwhile.

        Args:
            keys: of the notes.
            missing: makes the message from the keys of the notes that are not there.

        Raises:
            TensorkeepError: a note was not left in time.
        """
        if self._store is None:
            return
        ranks = {key: key.rpartition("/")[2] if "/" in key else "0" for key in keys}
        end, pause = time.monotonic() + self.timeout, _OFTEN
        try:
            while not self._store.check(list(keys)):
                gone = self._gone(ranks.values())
                if gone and (left := [k for k in keys if ranks[k] in gone and not self._store.check([k])]):
                    what = f"{self._named([f'note/{ranks[k]}' for k in left])} ended before it was done"
                    hint = "look why it ended; the same command goes on from the newest checkpoint"
                    raise TensorkeepError(what, where=self.name, hint=hint, exit_code=TEMPORARY)
                if time.monotonic() > end:
                    what = (
                        f"{missing([k for k in keys if not self._store.check([k])])} within {self.timeout:.0f} seconds"
                    )
                    raise TensorkeepError(
                        what, where=self.name, hint="look whether that process is alive, and its disk"
                    )
                time.sleep(pause)
                pause = min(pause * 1.3, _SELDOM, max(0.02, 0.001 * self.ranks))
        except RuntimeError as error:  # the store is a part of the first rank
            what = f"the first rank is gone: {str(error).splitlines()[0]}"
            raise TensorkeepError(what, where=self.name, hint="look why it ended", exit_code=TEMPORARY) from None

    def gather(self, note: bytes) -> list[bytes] | None:
        """Leave this rank's note; the first rank waits for those of all.

        Returns:
            The notes in the order of the ranks, on the first rank; None on the others.

        Raises:
            TensorkeepError: a rank did not leave its note in time.
        """
        if self._store is None:
            return [note]
        if self.rank:
            self.post(f"note/{self.rank}", note)
            return None
        others = [f"note/{rank}" for rank in range(1, self.ranks)]
        self.wait(others, lambda left: f"{self._named(left)} did not finish writing")
        return [note, *(self.read(key) for key in others)]

    def tell(self, verdict: bytes | None) -> bytes:
        """Tell all ranks what the first one found; it returns when they have heard it, or after a minute.

        Args:
            verdict: what it is, on the first rank; not used on the others.

        Raises:
            TensorkeepError: the first rank did not say it in time.
        """
        if self._store is None or not self.rank:
            assert verdict is not None
            self.post("verdict", verdict)
            end = time.monotonic() + _HEARD
            while self._store is not None and self._store.add("heard", 0) < self.ranks - 1:
                if time.monotonic() > end:  # one is gone, and its notes stay
                    return verdict
                if self._gone(map(str, range(1, self.ranks))):
                    end = min(end, time.monotonic() + _GRACE)
                time.sleep(_OFTEN)
            self._clear(len(verdict))
            return verdict
        self.wait(["verdict"], lambda _: f"{self._named(['note/0'])} did not say how the save ended")
        count = int(self._store.get("verdict"))
        verdict = b"".join(self._store.get(f"verdict/{number}") for number in range(count))
        self._store.add("heard", 1)
        return verdict

    def _clear(self, size: int) -> None:
        """Take away what is left of the notes, so that the store does not grow from save to save."""
        if self._store is not None:
            keys = [f"note/{rank}" for rank in range(self.ranks)]
            for key in (*keys, *(f"verdict/{part}" for part in range(-(-size // _PART))), "verdict", "heard"):
                self._store.delete_key(key)

    def _gone(self, asked: Iterable[str]) -> set[str]:
        """Which ranks were processes of this host that are there no more."""
        assert self._store is not None
        ranks = set(asked)
        for rank in ranks - set(self._near):
            if self._processes.check([rank]):
                self._near[rank] = _near(self._processes.get(rank).decode())
        return {rank for rank in ranks if (pid := self._near.get(rank)) is not None and not _lives(pid)}

    def _named(self, keys: Sequence[str]) -> str:
        """Name ranks and their hosts by the keys of their notes."""
        assert self._store is not None
        out = []
        for rank in (key.rpartition("/")[2] for key in keys[:8]):
            known = self._processes.check([rank])
            host = self._processes.get(rank).decode().rsplit(" ", 2)[0] if known else ""
            out.append(f"rank {rank}" + (f" on {host}" if host else ""))
        return ", ".join(out) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def introduced(rank: int, part: str = "") -> PrefixStore:
    """Tell the other processes of the group which process of which host this rank is.

    Args:
        rank: of this process.
        part: a name for a part of the group, whose ranks are counted anew.

    Returns:
        What they told, by rank; not all may have done so yet.
    """
    found = PrefixStore(f"tensorkeep/process/{part}", distributed_c10d._get_default_store())
    found.set(str(rank), f"{socket.gethostname()} {_space()} {os.getpid()}")
    return found


def _near(told: str) -> int | None:
    """Read what a process told of itself.

    Args:
        told: a word of `introduced`.

    Returns:
        The number of the process, None where it is one of another host or container.
    """
    host, space, pid = told.rsplit(" ", 2)
    return int(pid) if (host, space) == (socket.gethostname(), _space()) else None


def _space() -> str:
    """Return what numbers of processes are about: a container has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()).replace(" ", "")
    except OSError:
        return "-"


def _lives(pid: int) -> bool:
    """Tell whether a process of this host is there and has not ended.

    Args:
        pid: its number.

    Returns:
        Whether it lives; True where the system does not say.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc/self/stat").exists()
    except (OSError, IndexError):
        return True
