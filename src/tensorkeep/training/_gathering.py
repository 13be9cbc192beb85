"""Go on from a checkpoint of which every host keeps a part: which is whole, who has what, and what must be fetched.

All hosts tell what they have. The newest checkpoint of which every file is on some host is taken. A host that lacks
some makes a folder under a temporary name: its files linked, the small ones fetched, the others empty but as long as
they are; a rank then fetches the byte ranges that it will read, and each piece is compared with its digest as ever.
"""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.manifest_entries import list_name
from tensorkeep.storage.manifest_hosts import Held, lacking
from tensorkeep.storage.placement import remove, temporary_name
from tensorkeep.storage.run_folder import CHECKPOINTS
from tensorkeep.storage.run_manifest import MANIFEST
from tensorkeep.training import metrics
from tensorkeep.training._transfer import Piece, exchange
from tensorkeep.training.distributed import World, gathered, together
from tensorkeep.training.hosts import Hosts

Range = tuple[str, int, int]  # file, first byte, bytes
_GAP = 4096  # bytes between two ranges that are fetched as one
_LARGE = (".distcp", ".shards.json")  # files that are fetched in part, or when they are wanted
_ROWS = (metrics.METRICS, f"{CHECKPOINTS}/{metrics.PROOF}", f"{CHECKPOINTS}/{metrics.RESUMES}")


class Copy(NamedTuple):
    """What one host has of one checkpoint.

    Attributes:
        step: its step.
        key: digest of its manifest; two saves of one step have two.
        sizes: bytes of every file of the checkpoint, there or not.
        here: the files that are there, as long as they must be.
        held: who kept which.
    """

    step: int
    key: str
    sizes: dict[str, int]
    here: list[str]
    held: Held


class Stock(NamedTuple):
    """What one host has: checkpoints, what is wrong with others, last step and size of its files of rows."""

    copies: list[Copy]
    wrong: list[Finding]
    rows: dict[str, tuple[int, int]]


@dataclass
class Whole:
    """A checkpoint of which every file is on some host.

    Attributes:
        run: the run's folder here.
        hosts: of the run.
        world: this process among its peers.
        step: its step.
        sizes: bytes of every file.
        holders: the hosts that have each.
        path: where this host reads it: its step folder, or one under a temporary name.
        fetched: bytes that came from other hosts to this rank.
    """

    run: Path
    hosts: Hosts
    world: World
    step: int
    sizes: dict[str, int]
    holders: dict[str, list[int]]
    path: Path = field(default=Path())
    fetched: int = field(default=0)

    @property
    def folder(self) -> Path:
        """Its step folder on this host, there or not."""
        return run_folder.folder_of(self.run, self.step)

    def here(self, name: str) -> bool:
        """Whether this host has a file of its own."""
        return self.hosts.mine in self.holders[name]

    def assemble(self) -> None:
        """Make the folder that this host reads; every rank must call it.

        Raises:
            TensorkeepError: on every rank: a disk fails, or a host is gone.
        """
        own = together(self.world, lambda: str(self._begun()) if self.hosts.leads else "")
        self.path = Path(gathered(self.world, own)[self.hosts.ranks(self.hosts.mine)[0]])
        small = [n for n in self.sizes if not self.here(n) and not n.endswith(_LARGE)] if self.hosts.leads else []
        self._fetch([(name, 0, self.sizes[name]) for name in small])

    def _begun(self) -> Path:
        """Make this host's folder, with its own files and holes for the others'."""
        if all(map(self.here, self.sizes)):
            return self.folder
        with explained(self.run):
            made = temporary_name(self.folder)
            run_folder.make_folder(made.parent)
            made.mkdir()
            for name, size in self.sizes.items():
                if self.here(name):
                    _link(self.folder / name, made / name)
                elif name.endswith(_LARGE):
                    with (made / name).open("xb") as file:
                        file.truncate(size)
        return made

    def fetch(self, shards: Any, into: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fetch what this rank will read of files that other hosts have; every rank must call it.

        Args:
            shards: of the checkpoint, opened at `path`.
            into: as its `read` takes it.

        Raises:
            TensorkeepError: on every rank: a list of shards is damaged, a disk fails, or a host is gone.
        """
        wanted = gathered(self.world, together(self.world, lambda: shards.files(into)))
        files = {file for rank in self.hosts.ranks(self.hosts.mine) for file in wanted[rank] if not self.here(file)}
        lists = sorted(list_name(file) for file in files if not self.here(list_name(file)))
        self._fetch([(name, 0, self.sizes[name]) for name in lists] if self.hosts.leads else [])
        ranges = together(self.world, lambda: [r for r in shards.ranges(into) if not self.here(r[0])])
        self._fetch(joined(ranges))

    def _fetch(self, wants: Sequence[Range]) -> None:
        """Let ranges of files come from who has them; every rank must call it."""
        rank, asked = self.world.rank, gathered(self.world, list(wants))
        given = [(peer, want) for peer, own in enumerate(asked) for want in own if self._giver(peer, want[0]) == rank]
        out = [Piece(peer, self.folder / file, at, size) for peer, (file, at, size) in given]
        into = [Piece(self._giver(rank, file), self.path / file, at, size) for file, at, size in wants]
        together(self.world, lambda: exchange(self.hosts.group, rank, self.world.size, out, into))
        self.fetched += sum(size for _, _, size in wants)

    def _giver(self, rank: int, file: str) -> int:
        """The rank that gives a file to another: of the next host that has it, one after another by the file."""
        after = self.hosts.of[rank] + 1
        host = min(self.holders[file], key=lambda h: (h - after) % self.hosts.count)
        own = self.hosts.ranks(host)
        return own[zlib.crc32(file.encode()) % len(own)]

    def close(self, failed: bool = False) -> int:
        """Take away what was made for reading; every rank must call it.

        Args:
            failed: the run ends, so nobody is waited for.

        Returns:
            Bytes that came from other hosts, to all ranks.
        """
        fetched = self.fetched if failed else sum(gathered(self.world, self.fetched))
        if self.hosts.leads and self.path != self.folder:
            remove(self.path)
        return fetched


def _link(path: Path, other: Path) -> None:
    """Give a file a second name; where the file system has no such links it is copied."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(path, other)


def joined(ranges: Sequence[Range]) -> list[Range]:
    """Join ranges that touch, or nearly.

    Args:
        ranges: sorted.

    Example:
        >>> joined([("a", 0, 10), ("a", 20, 5), ("a", 9000, 1), ("b", 9001, 1)])
        [('a', 0, 25), ('a', 9000, 1), ('b', 9001, 1)]
    """
    out: list[Range] = []
    for file, start, size in ranges:
        if out and out[-1][0] == file and start <= sum(out[-1][1:]) + _GAP:
            first = out[-1][1]
            out[-1] = (file, first, max(sum(out[-1][1:]), start + size) - first)
        else:
            out.append((file, start, size))
    return out


def stock_of(run: Path) -> Stock:
    """Look what a host has.

    Args:
        run: its run folder.
    """
    copies, wrong, rows = [], [], {}
    for step in run_folder.steps(run):
        folder = run_folder.folder_of(run, step)
        try:
            manifest = run_manifest.read_manifest(folder)
        except TensorkeepError as error:
            wrong.append(run_manifest.as_finding(error, "warning"))
            continue
        if manifest.step != step:
            continue
        with explained(folder):
            data = (folder / MANIFEST).read_bytes()
            sizes = {MANIFEST: len(data), **{name: entry.size for name, entry in manifest.files.items()}}
            here = [n for n, size in sizes.items() if (folder / n).is_file() and (folder / n).stat().st_size == size]
        copies.append(Copy(step, xxhash.xxh3_128(data).hexdigest(), sizes, here, manifest.hosts))
    for name in _ROWS:
        last = [row["step"] for row in metrics.rows(run / name)]
        if last:
            rows[name] = (last[-1], (run / name).stat().st_size)
    return Stock(copies, wrong, rows)


def newest_whole(
    run: Path, hosts: Hosts, world: World, damaged: Mapping[str, Finding]
) -> tuple[Whole | None, list[Finding], int]:
    """Find the newest checkpoint of which every file is on some host; all ranks find the same.

    The first host gets the rows of the run from the host that has more of them.

    Args:
        run: the run's folder on this host.
        hosts: of the run.
        world: this process among its peers; every rank must call this.
        damaged: names of step folders that were read and are damaged.

    Returns:
        The checkpoint, or None; findings about newer ones; and how many checkpoints there are at all.

    Raises:
        TensorkeepError: on every rank: a disk fails.
    """
    own = together(world, lambda: stock_of(run) if hosts.leads else None)
    stocks = {hosts.of[rank]: stock for rank, stock in enumerate(gathered(world, own)) if stock is not None}
    found: dict[tuple[int, str], list[tuple[int, Copy]]] = {}
    for host, stock in stocks.items():
        for copy in stock.copies:
            found.setdefault((copy.step, copy.key), []).append((host, copy))
    skipped = [f for stock in stocks.values() for f in stock.wrong]
    for (step, _), copies in sorted(found.items(), key=lambda entry: entry[0], reverse=True):
        sizes, name = copies[0][1].sizes, run_manifest.step_name(step)
        holders = {file: [host for host, copy in copies if file in copy.here] for file in sizes}
        if name in damaged:
            skipped.append(damaged[name])
        elif lost := [file for file, there in holders.items() if not there]:
            away = lacking(copies[0][1].held, [f for f in sizes if holders[f]]) or ", ".join(lost[:4])
            what = f"{name}: no host of this run has the shards of {away}"
            skipped.append(Finding("F05", "warning", what, fix=_BRING))
        else:
            _carry_rows(run, hosts, world, stocks)
            return Whole(run, hosts, world, step, sizes, holders), skipped, len(found)
    return None, skipped, len(found)


_BRING = "bring that host back, or copy its checkpoints into another host's run folder; --resume never begins anew"


def _carry_rows(run: Path, hosts: Hosts, world: World, stocks: Mapping[int, Stock]) -> None:
    """Bring metrics and noted losses to the first host, where another has more of them; every rank must call it."""
    out: list[Piece] = []
    into: list[tuple[Path, Piece]] = []
    for name in _ROWS:
        known = {host: stock.rows[name] for host, stock in stocks.items() if name in stock.rows}
        best = max(known, key=lambda host: known[host], default=0)
        if best == 0 or known[best][0] <= known.get(0, (-1, 0))[0]:
            continue
        size, giver = known[best][1], hosts.ranks(best)[0]
        if world.rank == giver:
            out.append(Piece(0, run / name, 0, size))
        if world.first:
            into.append((run / name, Piece(giver, temporary_name(run / name), 0, size)))

    def carry() -> None:
        with explained(run):
            (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            exchange(hosts.group, world.rank, world.size, out, [piece for _, piece in into])
            for path, piece in into:
                piece.path.replace(path)

    together(world, carry)


def none_whole(run: Path, skipped: Sequence[Finding], count: int, hosts: Hosts) -> TensorkeepError:
    """Return the error where there are checkpoints, and none is whole.

    Args:
        run: the run's folder.
        skipped: what was found, newest first.
        count: how many checkpoints there are.
        hosts: of the run.
    """
    return TensorkeepError(
        f"none of its {max(count, len(skipped))} checkpoints is whole on the {hosts.count} hosts of this run;"
        f" the newest: {skipped[0].message}",
        where=run,
        code=skipped[0].code,
        hint=_BRING,
    )
