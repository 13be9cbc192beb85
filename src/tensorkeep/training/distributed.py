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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from tensorkeep.errors import TEMPORARY, TensorkeepError

T = TypeVar("T")
_WAIT, _PAUSE = 1800.0, 0.02  # seconds: for the others of a start, as torch waits; between two looks
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
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0


def start(device: str | None = None, wait: float | None = None) -> World:
    """Join the group that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK), or be the only process.

    Args:
        device: `cpu`, `cuda` or `cuda:N` (None: a GPU where there is one).
        wait: seconds that torchrun's processes wait for each other here; None: half an hour, as torch does.

    Returns:
        This process among its peers, with the device it computes on.

    Raises:
        TensorkeepError: there is no such device, or a process did not come.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise TensorkeepError("no CUDA device is here", where="device", hint="--device cpu")
    size, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place = torch.device(kind if ":" in kind or kind != "cuda" else f"cuda:{local}")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", rank, size, wait or _WAIT)
    return World(rank, size, place)


def _join(backend: str, rank: int, size: int, wait: float) -> None:
    """Make the default group of processes, also where torchrun has started this job's processes before.

    torchrun keeps one store for all starts of a job (measured with torch 2.13), and keys of the processes that died
    stay in it: a new process would read the address of one that is gone. So those of a start first agree on a word that
    no start before has used, and keep all of theirs under it.
    """
    with _ending():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            dist.init_process_group(backend)
            return
        store, _, _ = next(rendezvous("env://", rank, size))
        word = _agreed(PrefixStore("tensorkeep/start", store), rank, size, wait)
        dist.init_process_group(backend, store=PrefixStore(word, store), rank=rank, world_size=size)


def _agreed(store: Any, rank: int, size: int, wait: float) -> str:
    """Agree on a word with the processes of this start, whatever others have left in the store.

    Each leaves a word of its own; the first process says whose it has read, and does so anew while one is replaced. Who
    finds its own among them answers under the first one's word.

    Args:
        store: of all starts.
        rank: of this process.
        size: how many there are.
        wait: seconds.

    Returns:
        The same word on every rank, which was never used before.

    Raises:
        TensorkeepError: a rank did not come in time.
    """
    own, end, pause = secrets.token_hex(8), time.monotonic() + wait, max(_PAUSE, 0.0005 * size)
    said, others = None, range(1, size)
    if rank:
        store.set(f"here/{rank}", own)
    while True:
        if rank and store.check(["first"]):
            word, known = json.loads(store.get("first"))
            if len(known) == size and known[rank] == own:
                store.set(f"{word}/{rank}", "1")
                return str(word)
        elif not rank:
            keys = [f"here/{r}" for r in others]
            known = [own, *(store.get(key).decode() if store.check([key]) else "" for key in keys)]
            if known != said:
                said = known
                store.set("first", json.dumps([own, known]))
            if all(store.check([f"{own}/{r}"]) for r in others):
                return own
        if time.monotonic() > end:
            late = "rank 0" if rank else ", ".join(f"rank {r}" for r in others if not store.check([f"{own}/{r}"]))
            what = f"{late} did not come within {wait:.0f} s"
            raise TensorkeepError(what, where="several processes", hint="look at its output", exit_code=TEMPORARY)
        time.sleep(pause)


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
