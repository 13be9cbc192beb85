"""Run as one process or as many under torchrun, with the same code.

Nothing here launches or schedules. Small facts (counts, a request to stop, random states) travel between CPUs through
gloo, so that no step waits for a GPU to tell them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store, default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TEMPORARY, TensorkeepError

T = TypeVar("T")
_JOIN = 600.0  # seconds that ranks wait for each other at the start; TENSORKEEP_JOIN_SECONDS
_HEARD = 5.0  # seconds; how long the first rank stays for the others to hear who is missing
_HINT = "look whether it was started and is alive; MASTER_ADDR is rank 0's host as all others reach it"
_PAUSE = 0.02  # seconds between two looks
# of torch's errors: gloo's and NCCL's when a process they talk to is gone
_SIGNS = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "likely closed",
    "NCCL",
    "gloo/transport",
)


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Args:
        rank: from 0.
        size: how many processes there are.
        device: the device that this one computes on.
        here: whether this rank makes the files of its host's folder, where each host has one of its own; None: the
            first rank makes them, for all.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    here: bool | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0

    @property
    def makes(self) -> bool:
        """Whether this rank makes the files of the run's folder that it sees."""
        return self.first if self.here is None else self.here


def start(device: str | None = None, wait: float | None = None) -> World:
    """Join the group that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK), or be the only process.

    Args:
        device: `cpu`, `cuda` or `cuda:N` (None: a GPU where there is one).
        wait: seconds that processes wait for each other here; None: ten minutes.

    Returns:
        This process among its peers, with the device it computes on.

    Raises:
        TensorkeepError: there is no such device; or ranks did not come in time (TENSORKEEP_JOIN_SECONDS, where set), or
            cannot reach each other: they are named.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise TensorkeepError("no CUDA device is here", where="device", hint="--device cpu")
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place = torch.device(kind if ":" in kind or kind != "cuda" else f"cuda:{local}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", rank, size, wait)
    return World(rank, size, place)


def _join(backend: str, rank: int, size: int, wait: float | None) -> None:
    """Make the default group of processes once all are there."""
    with _ending():
        store = _met(rank, size, float(os.environ.get("TENSORKEEP_JOIN_SECONDS", wait or _JOIN)))
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        except RuntimeError as error:
            what = f"rank {rank} on {socket.gethostname()} does not reach the other ranks: {_first_line(error)}"
            hint = (
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network that all hosts share; look at the firewall"
            )
            raise TensorkeepError(what, where="several processes", hint=hint) from None


def _met(rank: int, size: int, seconds: float) -> Store:
    """Wait in the store of torchrun, or of rank 0, until all ranks are there; name those that do not come.

    torchrun keeps one store for all starts of a job (measured with torch 2.13), and keys of the processes that died
    stay in it: a new process would read the address of one that is gone. So those of a start first agree on a word that
    no start before has used, and keep all of theirs under it.
    """
    host = socket.gethostname()
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    owned = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        found = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=rank == 0 and owned,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store = _agreed(PrefixStore("tensorkeep/start", found), rank, size, seconds, fresh=owned)
    except RuntimeError as error:
        what = f"rank {rank} on {host} finds nobody at {address}:{port} within {seconds:.0f} seconds, or lost it"
        raise TensorkeepError(f"{what}: {_first_line(error)}", where="several processes", hint=_HINT) from None
    found.set_timeout(default_pg_timeout)
    return store


def _agreed(start: Store, rank: int, size: int, seconds: float, fresh: bool = False) -> Store:
    """Return a part of a store for the processes of this start alone, once all are there; `fresh`: it is the first."""
    own = secrets.token_hex(8)
    word = "first" if fresh else own if rank == 0 else _adopted(start, rank, size, own, seconds)
    store = PrefixStore(word, start)
    store.set(f"host/{rank}", socket.gethostname())
    _await(store, size, seconds, _announced(start, size, own) if rank == 0 and not fresh else None)
    return store


def _announced(start: Any, size: int, own: str) -> Callable[[], None]:
    """Return what the first rank does at each look: say its word, and whose it has read, where one was replaced."""
    said: list[str] = []

    def look() -> None:
        keys = [f"here/{rank}" for rank in range(1, size)]
        known = [own, *(start.get(key).decode() if start.check([key]) else "" for key in keys)]
        if known != said:
            said[:] = known
            start.set("first", json.dumps([own, known]))

    return look


def _adopted(start: Any, rank: int, size: int, own: str, seconds: float) -> str:
    """Leave a word, and wait until the first rank of this start has read it; return the first one's."""
    end, pause = time.monotonic() + seconds + _HEARD, max(_PAUSE, 0.0005 * size)
    start.set(f"here/{rank}", own)
    while time.monotonic() < end:
        if start.check(["first"]):
            word, known = json.loads(start.get("first"))
            if len(known) == size and known[rank] == own:
                return str(word)
        time.sleep(pause)
    what = f"rank 0 of {size} did not come within {seconds:.0f} seconds"
    raise TensorkeepError(what, where="several processes", hint=_HINT, exit_code=TEMPORARY)


def _await(store: Store, size: int, seconds: float, look: Callable[[], None] | None) -> None:
    """Wait until all ranks have written their host into a store; TensorkeepError names the others, on all alike."""
    end, pause = time.monotonic() + seconds, 0.002
    count = store.add("came", 1)
    while count < size:
        if look is not None:
            look()
        if store.check(["missing"]):
            store.add("heard", 1)
            what = store.get("missing").decode()
            raise TensorkeepError(what, where="several processes", hint=_HINT, exit_code=TEMPORARY)
        if time.monotonic() > end:
            what = _missing(store, size, seconds)
            store.set("missing", what)
            heard = time.monotonic() + _HEARD  # the store may end with this process
            while store.add("heard", 0) < count - 1 and time.monotonic() < heard:
                time.sleep(0.02)
            raise TensorkeepError(what, where="several processes", hint=_HINT, exit_code=TEMPORARY)
        time.sleep(pause)
        pause = min(pause * 1.3, max(0.05, 0.001 * size))
        count = store.add("came", 0)


def _missing(store: Store, size: int, seconds: float) -> str:
    """Say which ranks came, from which hosts, and which did not."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # of torchrun: ranks of a node
    came: dict[str, list[int]] = {}
    gone: list[int] = []
    for rank in range(size):
        if store.check([f"host/{rank}"]):
            came.setdefault(store.get(f"host/{rank}").decode(), []).append(rank)
        else:
            gone.append(rank)
    nodes = f" (node {_numbers(sorted({rank // each for rank in gone}))})" if each else ""
    there = "; ".join(f"{_numbers(ranks)} on {host}" for host, ranks in list(came.items())[:8])
    return f"rank {_numbers(gone)}{nodes} of {size} did not come within {seconds:.0f} seconds; here are {there}"


def _numbers(found: Sequence[int]) -> str:
    """Spell numbers for a message, at most eight."""
    return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _first_line(error: BaseException) -> str:
    """Return what a message of torch begins with."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Within it SIGTERM ends the process at once: nothing is lost yet, and waiting in C++ no handler would run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def stop() -> None:
    """Leave the group that `start` joined, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def peers_named(place: object, world: World) -> Iterator[None]:
    """Turn what an exchange raises when another process has ended into one plain error.

    Args:
        place: what the error is about.
        world: this process among its peers.

    Yields:
        Nothing.

    Raises:
        TensorkeepError: an exchange with the other processes failed, of several; the exit code is the watchdog's.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip().splitlines() or [""]
        if world.size == 1 or not any(sign in str(error) for sign in _SIGNS):
            raise
        hint = "look which one ended first, and why; the same command goes on from the newest checkpoint"
        what = (
            f"rank {world.rank} on {socket.gethostname()} lost another process: {words[0].partition('. This is ')[0]}"
        )
        raise TensorkeepError(what, where=place, hint=hint, exit_code=TEMPORARY) from error


def total(world: World, *values: float) -> list[float]:
    """Sum numbers over all ranks, in float64 on the CPU.

    Args:
        world: every rank must call this, with equally many values.
        values: this rank's numbers.

    Returns:
        The sums, in the same order.
    """
    if world.size == 1:
        return [float(v) for v in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return [float(v) for v in sums]


def gathered(world: World, value: Any) -> list[Any]:
    """Collect a value from every rank.

    Args:
        world: every rank must call this.
        value: this rank's value, which must be picklable.

    Returns:
        The values in the order of the ranks, the same list on each.
    """
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def together(world: World, work: Callable[[], T]) -> T:
    """Do this rank's work, and raise an error of any rank on all of them, so that none waits for one that left.

    Args:
        world: every rank must call this.
        work: what this rank does.

    Returns:
        What `work` returned here.

    Raises:
        TensorkeepError: `work` raised it on this rank or another.
    """
    result: T | None = None
    error: TensorkeepError | None = None
    try:
        result = work()
    except TensorkeepError as caught:
        error = caught
    for told in gathered(world, error):
        if told is not None:
            raise error or told
    return result  # type: ignore[return-value]


def from_first(world: World, work: Callable[[], T]) -> T:
    """Do work on the first rank, and give what it returned, or raise what it raised, on all.

    Args:
        world: every rank must call this.
        work: what the first rank does; its result must be picklable.

    Returns:
        What `work` returned on the first rank.

    Raises:
        TensorkeepError: `work` raised it.
    """
    found: T | TensorkeepError | None = None
    if world.first:
        try:
            found = work()
        except TensorkeepError as error:
            found = error
    told = gathered(world, found)[0]
    if isinstance(told, TensorkeepError):
        raise told
    return told  # type: ignore[no-any-return]


def same_start(world: World, tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with the first rank's values, as DDP does when it is made."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def add_up(world: World, tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all ranks in place, in one exchange; all have one dtype and the same order on each rank."""
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def parallel(model: nn.Module, world: World, deterministic: bool = False) -> nn.Module:
    """Put a model under DDP where there are several ranks.

    Every rank starts from the same buffers, but DDP does not exchange them in a forward: frozen codes need no trip, and
    what a loss keeps in a buffer it must reduce itself.

    Args:
        model: to be trained.
        world: this process among its peers.
        deterministic: give gradients memory of their own. As pieces of buckets they lie at other addresses in the first
            update of a start than later, and a GPU's libraries may choose a kernel by the address.
    """
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has renamed it
    alone: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=not deterministic, **alone)
