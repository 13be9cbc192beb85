"""One sharded save on its way to the disk: this rank's file written, then all ranks' made a checkpoint by the first."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import remove, swap_names, sync_folder
from tensorkeep.storage.run_folder import OPTIMIZER
from tensorkeep.training._board import Board
from tensorkeep.training._retention import Keep
from tensorkeep.training._save_work import name_latest, not_finite, told_full
from tensorkeep.training._shard_commit import About, complete, described, gathered, packed, unpacked
from tensorkeep.training._shard_files import Report, source_of, write
from tensorkeep.training.distributed import World

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
    seconds: float = field(default=0.0)

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
            image = self.staged.wait().get(self.part.share.layout.name) if self.staged is not None else None
            share, keys = self.part.share, {item.at: key for key, item in self.part.share.items.items()}
            source = image if image is not None else source_of(share, lambda at: self.part.tensors[keys[at]])
            with explained(self.run):
                report, unsound = write(self.part.folder, share, source, _looked, socket.gethostname())
            if unsound:
                return not_finite(self.part.folder, "the checkpoint", unsound)
            # where the first rank knows them they need no trip
            return report if self.part.description is None else report._replace(places={})
        except TensorkeepError as error:
            return told_full(self.run, self.part.needed, error)
        except Exception as error:  # noqa: BLE001  the other ranks are told
            return TensorkeepError(f"rank {self.world.rank} could not save: {error!r}", where=self.run)

    def _commit(self, board: Board, found: Report | TensorkeepError, final: Path) -> TensorkeepError | None:
        """Make all ranks' files a checkpoint; an error is for all ranks."""
        folder = self.part.folder
        try:
            reports = gathered(board, found)
            if isinstance(reports, TensorkeepError):
                return reports
            assert reports is not None and self.part.metadata is not None
            description = self.part.description or described(self.part.metadata, reports)
            complete(folder, description, reports, self.about)
            self.part.keep(description)
            with explained(self.run):
                if os.path.lexists(final):  # a damaged one that a resume passed over, or the same step again
                    swap_names(folder.resolve(), final.resolve())
                else:
                    os.rename(folder, final)  # noqa: PTH104  the fault-injecting tests count os-level calls
                sync_folder(final.parent)
            return None
        except TensorkeepError as error:
            return told_full(self.run, self.part.needed, error)
        except Exception as error:  # noqa: BLE001  the other ranks are told
            return TensorkeepError(f"the first rank could not save: {error!r}", where=self.run)
        finally:
            remove(folder)

    def tidy(self) -> None:
        """Name this checkpoint the latest and delete what need not stay; the first rank alone does this."""
        if self.world.first:
            name_latest(self.run, self.keep, self.step)


def _looked(name: str) -> bool:
    """Whether a tensor is looked through for NaN and Inf: all but the optimizer's."""
    return not name.startswith(f"{OPTIMIZER.partition('.')[0]}.")
