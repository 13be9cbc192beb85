"""Before a run of several processes begins: they share its folder, and agree on what they are to train.

Two hosts with folders of their own would train without a word, and start again from nothing when the first rank moves
to the other. Each check names the rank and its host, and fails on all ranks at once, before the first update.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import write_bytes
from tensorkeep.training.distributed import World, from_first, gathered, together
from tensorkeep.training.hosts import Hosts, find_hosts
from tensorkeep.training.sections import CheckpointConfig

_SIGN, _WAIT, _SKEW = ".preflight-", 10.0, 5.0  # file's name; seconds that a network's cache may take; seconds


def shared_folder(run: str | Path, world: World) -> None:
    """Prove that all processes see one run folder: the first writes a file that nobody can guess, all look for it.

    Args:
        run: the run's folder, which is made where it is not there.
        world: this process among its peers; every rank must call this.

    Raises:
        TensorkeepError: a rank does not see the file (F05); it and its host are named.
    """
    if world.size == 1:
        return
    folder, host = Path(run), socket.gethostname()
    sign, said, first = from_first(world, lambda: _put_up(folder))
    end = time.monotonic() + _WAIT
    while not (seen := _reads(folder / sign, said)) and time.monotonic() < end:
        time.sleep(0.2)
    blind = [place for place in gathered(world, None if seen else f"rank {world.rank} on {host}") if place]
    if world.first:
        with contextlib.suppress(OSError):
            (folder / sign).unlink()
    if blind:
        raise TensorkeepError(
            f"is not one folder for all processes: {', '.join(blind[:4])} does not see what rank 0 on {first} wrote",
            where=folder,
            code="F05",
            hint="--out on a file system that all hosts mount at the same path, or --checkpoint.local true",
        )


def folders(run: str | Path, world: World, checkpoint: CheckpointConfig) -> Hosts | None:
    """Prove that all processes see one folder, or with `checkpoint.local` those of each host one of their own.

    Args:
        run: the run's folder, which is made where it is not there.
        world: this process among its peers; every rank must call this.
        checkpoint: the recipe's section.

    Returns:
        The hosts, where each keeps its own ranks' shards.

    Raises:
        TensorkeepError: a rank does not see its folder, or two hosts see one (F05); rank and host are named.
    """
    if world.size == 1 or not checkpoint.local:
        shared_folder(run, world)
        return None
    hosts, folder = find_hosts(world), Path(run)
    together(world, lambda: _cleared(folder) if hosts.leads else None)
    signs = gathered(world, together(world, lambda: _put_up(folder, clear=False) if hosts.leads else None))
    own = signs[hosts.ranks(hosts.mine)[0]]
    end = time.monotonic() + _WAIT
    while not (seen := _reads(folder / own[0], own[1])) and time.monotonic() < end:
        time.sleep(0.2)
    others = [rank for rank, sign in enumerate(signs) if sign is not None and sign is not own]
    strange = next((rank for rank in others if _reads(folder / signs[rank][0], signs[rank][1])), None)
    told = gathered(world, (seen, strange))
    if hosts.leads:
        with contextlib.suppress(OSError):
            (folder / own[0]).unlink()
    for rank, (sees, other) in enumerate(told):
        name, lead = hosts.names[hosts.of[rank]], hosts.ranks(hosts.of[rank])[0]
        if other is not None:
            raise TensorkeepError(
                f"is one folder for several hosts: rank {rank} on {name} sees what rank {other} on"
                f" {hosts.names[hosts.of[other]]} wrote, and checkpoint.local keeps each host's shards apart",
                where=folder,
                code="F05",
                hint="--out on a disk of each host's own, or --checkpoint.local false",
            )
        if not sees:
            raise TensorkeepError(
                f"is not one folder for all processes of {name}: rank {rank} does not see what rank {lead} wrote",
                where=folder,
                code="F05",
                hint="give all processes of a host the same --out",
            )
    return hosts


def _cleared(folder: Path) -> None:
    """Make the folder, and take away what runs that died here left."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_SIGN}*"):
            left.unlink()


def _put_up(folder: Path, clear: bool = True) -> tuple[str, str, str]:
    """Write the file; gives its name, what is in it, and the host."""
    if clear:
        _cleared(folder)
    name, said = f"{_SIGN}{secrets.token_hex(8)}", secrets.token_hex(16)
    with explained(folder):
        write_bytes(folder / name, said.encode())
    return name, said, socket.gethostname()


def _reads(path: Path, said: str) -> bool:
    """Whether a file is there, with these words."""
    try:
        return path.read_bytes() == said.encode()
    except OSError:
        return False


def agree(facts: dict[str, Any], world: World) -> list[str]:
    """Prove that all processes have the same facts: versions of torch and tensorkeep, and those given.

    Args:
        facts: what is compared by its digest, by what it is called (recipe, data, base).
        world: this process among its peers; every rank must call this.

    Returns:
        What is odd and does no harm: clocks that are far apart.

    Raises:
        TensorkeepError: a rank has another fact than the first; it and its host are named, on all ranks alike.
    """
    if world.size == 1:
        return []
    own = {"torch": str(torch.__version__), "tensorkeep": sys.modules["tensorkeep"].__version__}
    own |= {name: _digest(value) for name, value in facts.items()}
    gathered(world, None)  # all are here, so that the clocks are read at one moment
    told = gathered(world, (socket.gethostname(), time.time(), own))
    first, others = told[0], list(enumerate(told))[1:]
    for rank, (host, _, theirs) in others:
        for name, value in theirs.items():
            if value != first[2].get(name):
                was = f": {value} against {first[2].get(name)}" if name not in facts else ""
                raise TensorkeepError(
                    f"rank {rank} on {host} has another {name} than rank 0 on {first[0]}{was}",
                    where="several processes",
                    hint="install the same versions, and give all ranks the same recipe and files",
                )
    late = [(rank, host, clock - first[1]) for rank, (host, clock, _) in others if abs(clock - first[1]) > _SKEW]
    return [f"note: the clock of rank {r} on {h} is {by:+.0f} s from that of rank 0" for r, h, by in late]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
