"""One sharded save on its way to the disk: this rank's file written, then all ranks' made a checkpoint by the first."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.manifest_entries import list_name
from tensorkeep.storage.placement import remove, swap_names, sync_file, sync_folder, temporary_name
from tensorkeep.storage.run_folder import METADATA, OPTIMIZER
from tensorkeep.training._board import Board
from tensorkeep.training._retention import Keep, best, mark_best
from tensorkeep.training._save_work import name_latest, not_finite, told_full
from tensorkeep.training._shard_commit import (
    About,
    complete,
    completed,
    described,
    described_by,
    gathered,
    packed,
    unpacked,
)
from tensorkeep.training._shard_files import Report, source_of, write
from tensorkeep.training._transfer import Piece, exchange
from tensorkeep.training.distributed import World
from tensorkeep.training.hosts import Hosts

if TYPE_CHECKING:
    from tensorkeep.training._shard_plan import Part
    from tensorkeep.training._staging import Staged


@dataclass
class ShardWork:
    """One rank's part of a save on its way; nothing in it is the caller's, unless it is carried out at once."""

    run: Path
    keep: Keep
    step: int
    world: World
    part: Part
    about: About
    staged: Staged | None
    started: float
    hosts: Hosts | None = None
    first: Callable[[], None] | None = None
    seconds: float = field(default=0.0)
    report: Report | None = field(default=None)

    def carry_out(self) -> Path:
        """Write this rank's file and wait for the others'; the checkpoint is durable and in place when this returns.

        No collective is held: ranks leave notes, and wait for them for half an hour at most.

        Raises:
            TensorkeepError: on every rank, where one of them failed; the checkpoints before stay.
        """
        board = Board(self.part.meeting, self.world.rank, self.world.size)
        final = run_folder.folder_of(self.run, self.step)
        found = self._written()
        if not self.world.first:
            gathered(board, found)
            if self.hosts is not None and self.hosts.leads:
                self._among_hosts(final, {})
            verdict = unpacked(board.tell(None))
        else:
            verdict = self._commit(board, found, final)
            board.tell(packed(verdict))
        if verdict is not None:
            raise verdict
        self.seconds = time.perf_counter() - self.started
        return final

    def _written(self) -> Report | TensorkeepError:
        """Write this rank's file; an error is for all ranks."""
        try:
            if self.first is not None:
                self.first()
            image = self.staged.wait().get(self.part.share.layout.name) if self.staged is not None else None
            share, keys = self.part.share, {item.at: key for key, item in self.part.share.items.items()}
            source = image if image is not None else source_of(share, lambda at: self.part.tensors[keys[at]])
            with explained(self.run):
                self.report, unsound = write(self.part.folder, share, source, _looked, socket.gethostname())
            if unsound:
                return not_finite(self.part.folder, "the checkpoint", unsound)
            # where the first rank knows them they need no trip
            return self.report if self.part.description is None else self.report._replace(places={})
        except TensorkeepError as error:
            return told_full(self.run, self.part.needed, error)
        except Exception as error:  # noqa: BLE001  the other ranks are told
            return TensorkeepError(f"rank {self.world.rank} could not save: {error!r}", where=self.run)

    def _commit(self, board: Board, found: Report | TensorkeepError, final: Path) -> TensorkeepError | None:
        """Make all ranks' files a checkpoint; an error is for all ranks."""
        error = self._tried(lambda: self._completed(board, found))
        if self.hosts is not None and self.hosts.count > 1:
            return self._among_hosts(final, error or self._small())
        error = error or self._tried(lambda: self._place(final))
        remove(self.part.folder)
        return error

    def _tried(self, work: Callable[[], None]) -> TensorkeepError | None:
        """Do something; what goes wrong is for all ranks."""
        try:
            work()
        except TensorkeepError as error:
            return told_full(self.run, self.part.needed, error)
        except Exception as error:  # noqa: BLE001  the other ranks are told
            return TensorkeepError(f"rank {self.world.rank} could not save: {error!r}", where=self.run)
        return None

    def _completed(self, board: Board, found: Report | TensorkeepError) -> None:
        """Complete the first rank's folder, once every rank has written its file."""
        reports = gathered(board, found)
        if isinstance(reports, TensorkeepError):
            raise reports
        assert reports is not None and self.part.metadata is not None
        description = self.part.description or described(self.part.metadata, reports)
        complete(self.part.folder, description, reports, self.about)
        self.part.keep(description)

    # -- where every host has a folder of its own -------------------------------------------------------------------

    def _small(self) -> dict[str, bytes]:
        """What other hosts need beside their ranks' files; metadata that they have is not sent again."""
        small = described_by(self.part.folder, self.about)
        if self.part.description is not None:
            del small[METADATA]
        return small

    def _among_hosts(self, final: Path, found: dict[str, bytes] | TensorkeepError) -> TensorkeepError | None:
        """Commit on all hosts or on none: each is ready before one gives its folder the name.

        The first rank of every host calls it; `found` is the first one's, for all.
        """
        assert self.hosts is not None
        name, mine, count = f"{self.part.meeting}/hosts", self.hosts.mine, self.hosts.count
        try:
            told = unpacked(Board(f"{name}/small", mine, count).tell(packed(found) if self.world.first else None))
            if isinstance(told, TensorkeepError):
                return told
            ready = None if self.world.first else self._tried(lambda: self._ready(told))
            refused = self._first_error(f"{name}/ready", ready)
            return refused or self._first_error(f"{name}/placed", self._tried(lambda: self._place(final)))
        except TensorkeepError as late:  # somebody did not answer
            return late
        finally:
            remove(self.part.folder)

    def _ready(self, small: dict[str, bytes]) -> None:
        """Complete this host's folder, where all its ranks must have written."""
        assert self.hosts is not None
        folder, kept = self.part.folder, self.part.description
        completed(folder, small if METADATA in small or kept is None else {METADATA: kept, **small})
        manifest = run_manifest.read_manifest(folder)
        for file in manifest.hosts[self.hosts.mine][1]:
            if not (folder / file).is_file() or (folder / file).stat().st_size != manifest.files[file].size:
                what = f"{file} is not seen whole by rank {self.world.rank} on the same host"
                raise TensorkeepError(what, where=folder.parent, code="F05")
        self.part.keep((folder / METADATA).read_bytes() if kept is None else kept)

    def _first_error(self, name: str, own: TensorkeepError | None) -> TensorkeepError | None:
        """Give the first error that a host had to all of them."""
        assert self.hosts is not None
        board = Board(name, self.hosts.mine, self.hosts.count)
        notes = board.gather(packed(own))
        if notes is None:
            return unpacked(board.tell(None))  # type: ignore[no-any-return]
        found = next((error for error in map(unpacked, notes) if error is not None), None)
        return unpacked(board.tell(packed(found)))  # type: ignore[no-any-return]

    def _place(self, final: Path) -> None:
        """Give the folder its name."""
        with explained(self.run):
            if os.path.lexists(final):  # a damaged one that a resume passed over, or the same step again
                swap_names(self.part.folder.resolve(), final.resolve())
            else:
                os.rename(self.part.folder, final)  # noqa: PTH104  the fault-injecting tests count os-level calls
            sync_folder(final.parent)

    def tidy(self) -> None:
        """Copy to the next host, then name this checkpoint the latest and delete what need not stay.

        The first rank alone names and deletes, or the first of each host; the oldest go when all copies are there.

        Raises:
            TensorkeepError: on every rank, where a copy did not come about.
        """
        if self.hosts is None:
            if self.world.first:
                name_latest(self.run, self.keep, self.step)
            return
        board = Board(f"{self.part.meeting}/copies", self.world.rank, self.world.size)
        notes = board.gather(packed(self._tried(self._copies)))
        verdict: bytes | None = None
        if notes is not None:
            failed = next((error for error in map(unpacked, notes) if error is not None), None)
            verdict = packed((failed, best(self.run)))
        failed, step = unpacked(board.tell(verdict))
        if failed is not None:
            raise failed
        if self.hosts.leads:  # the first host alone evaluates
            if step is not None and step != best(self.run) and run_folder.folder_of(self.run, step).is_dir():
                mark_best(self.run, step)
            name_latest(self.run, self.keep, self.step)

    def _copies(self) -> None:
        """Send this rank's files to the next host, and keep those of the host before, compared with their digests."""
        hosts, rank, folder = self.hosts, self.world.rank, run_folder.folder_of(self.run, self.step)
        assert hosts is not None and self.report is not None
        target = hosts.copied_to(rank)
        out = [Piece(target, folder / n, 0, e.size) for n, e in self.report.files.items()] if target is not None else []
        manifest = run_manifest.read_manifest(folder) if hosts.copied_from(rank) else None
        into: list[Piece] = []
        names: list[str] = []
        for source in hosts.copied_from(rank):
            assert manifest is not None
            data = f"__{source}_0.distcp"
            names += [name for name in (data, list_name(data)) if name in manifest.files]
            into += [
                Piece(source, temporary_name(folder / name), 0, manifest.files[name].size)
                for name in (data, list_name(data))
                if name in manifest.files
            ]
        try:
            exchange(hosts.group, rank, self.world.size, out, into)
            for name, piece in zip(names, into):
                assert manifest is not None
                with explained(piece.path):
                    sync_file(piece.path)
                    wrong = durable.read_file(piece.path, piece.nbytes, manifest.files[name].chunks, None)
                    if wrong:
                        what = f"the copy of {name} from rank {piece.peer} did not arrive as it was written"
                        raise TensorkeepError(what, where=folder, code="F03", hint="look at the network and the disks")
                    os.rename(piece.path, folder / name)  # noqa: PTH104
            if into:
                sync_folder(folder)
        finally:
            for piece in into:
                remove(piece.path)


def _looked(name: str) -> bool:
    """Whether a tensor is looked through for NaN and Inf: all but the optimizer's."""
    return not name.startswith(f"{OPTIMIZER.partition('.')[0]}.")
