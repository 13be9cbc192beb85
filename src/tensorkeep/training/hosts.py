"""Which ranks run on which host, for runs whose every host keeps its ranks' shards on a disk of its own."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tensorkeep.training.distributed import World, gathered

_TIMEOUT = timedelta(minutes=30)  # of one chunk between two hosts


@dataclass(frozen=True)
class Hosts:
    """The hosts of a run, numbered by their lowest rank.

    Args:
        of: the host of each rank.
        names: what to call each.
        rank: of this process.
        copies: how many further hosts keep a copy of each one's shards.
        group: in which bytes go from host to host, beside the training's own (None: there is one host, or no traffic).
    """

    of: tuple[int, ...]
    names: tuple[str, ...]
    rank: int
    copies: int = 0
    group: Any = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def mine(self) -> int:
        """The host of this process."""
        return self.of[self.rank]

    @property
    def held(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Each host's name and ranks."""
        return tuple((name, tuple(self.ranks(host))) for host, name in enumerate(self.names))

    def ranks(self, host: int) -> list[int]:
        """The ranks of a host, in order."""
        return [rank for rank, on in enumerate(self.of) if on == host]

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its host, which makes folders and commits there."""
        return self.rank == self.ranks(self.mine)[0]

    def copied_to(self, rank: int) -> int | None:
        """The rank that keeps a copy of a rank's shards, on the next host; None where there are no copies."""
        if not self.copies or self.count == 1:
            return None
        there, own = self.ranks((self.of[rank] + 1) % self.count), self.ranks(self.of[rank])
        return there[own.index(rank) % len(there)]

    def copied_from(self, rank: int) -> list[int]:
        """The ranks whose shards a rank keeps copies of."""
        return [source for source in range(len(self.of)) if self.copied_to(source) == rank]


def find_hosts(world: World) -> Hosts:
    """Find which ranks share a host: those of one agent of torchrun (GROUP_RANK), else those of one host name.

    Args:
        world: this process among its peers; every rank must call this.

    Returns:
        The hosts, without copies and without a group for bytes.
    """
    told = gathered(world, (os.environ.get("GROUP_RANK"), socket.gethostname()))
    keys = list(dict.fromkeys(told))
    names = [host if node is None else f"{host} (node {node})" for node, host in keys]
    return Hosts(tuple(keys.index(key) for key in told), tuple(names), world.rank)


def connected(hosts: Hosts | None, copies: int) -> Hosts | None:
    """Give hosts a gloo group for bytes.

    Args:
        hosts: as `find_hosts` gave them, None where all share a folder; every rank must call this.
        copies: how many further hosts keep a copy of each one's shards.

    Returns:
        The same with their group.
    """
    if hosts is None:
        return None
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if hosts.count > 1 else None
    return replace(hosts, copies=copies, group=group)
