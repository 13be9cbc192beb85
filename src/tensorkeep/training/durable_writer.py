"""A storage writer for torch.distributed.checkpoint whose saves are durable, digested, and whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.files import explained
from tensorkeep.storage.leftovers import writing_in
from tensorkeep.storage.placement import clear_leftovers, remove, swap_names, sync_folder, temporary_name
from tensorkeep.storage.run_folder import METADATA, make_folder
from tensorkeep.storage.run_manifest import MANIFEST, step_of
from tensorkeep.training._board import TIMEOUT, Board
from tensorkeep.training._shard_commit import About, complete, described, gathered, packed, unpacked
from tensorkeep.training._shard_files import Report, lay_out, plain, source_of, write


class _Order(NamedTuple):
    """What the first rank tells each in the plan: where to write, under which name, and as which of how many."""

    folder: str
    meeting: str
    rank: int
    ranks: int


class DurableWriter(StorageWriter):
    """Write a torch.distributed.checkpoint save that survives a power cut, notices a flipped bit and commits as one.

    Every rank writes its own shards into one file, digested and fsynced; nothing is gathered. When all files are on
    the disk the first rank writes `.metadata` and `manifest.json`, and a rename gives the folder its name: before that
    nothing is there, whatever dies. The folder is what plain torch reads (`dcp.load` with a FileSystemReader,
    `dcp_to_torch_save`); `DurableReader` and `tensorkeep verify` compare it with the manifest. A checkpoint that is
    there already, and nothing else, is replaced in one step.

    Args:
        path: the checkpoint's folder, on a file system that all ranks share.
        timeout: seconds that ranks wait for the slowest to finish writing; no collective is held meanwhile.

    Raises:
        TensorkeepError: the folder holds something that is no such checkpoint.

    Example:
        >>> dcp.save(state, storage_writer=DurableWriter("run/step-100"))            # doctest: +SKIP
        >>> dcp.async_save(state, storage_writer=DurableWriter("run/step-200"))      # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = TIMEOUT) -> None:
        super().__init__()
        self.path, self.timeout = Path(path), timeout
        self._temporary: Path | None = None
        self._reports: list[Report] = []
        self._coordinator = True
        self._open = ExitStack()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder, as torch asks for it."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether this is a path on a file system."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, into `checkpoint_id` where that is given."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self._give_up()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take this rank's role."""
        if not kwargs.get("use_collectives", True):
            what = "a save without collectives commits rank by rank, and never as one"
            raise TensorkeepError(what, where=self.path, hint="leave use_collectives out")
        self._coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as the planner made it."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder under its temporary name, and tell every rank of it; the first rank alone does this."""
        final = self.path = self.path.resolve() if self.path.name in ("", "..") else self.path.absolute()
        with explained(final.parent):
            make_folder(final.parent)
            self._refuse_other_files()
            clear_leftovers(final)
            self._open.enter_context(writing_in(final.parent))
            self._temporary = temporary_name(final)
            self._temporary.mkdir()
        meeting = f"{self.path.name}/{secrets.token_hex(8)}"
        return [
            dataclasses.replace(plan, storage_data=_Order(str(self._temporary), meeting, rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards, and wait until those of all ranks are on the disk."""
        order: _Order = plan.storage_data
        board = Board(order.meeting, order.rank, order.ranks, self.timeout)
        error: Exception | None = None
        found: Report | TensorkeepError
        try:
            found = self._write(order, plan, planner)
        except Exception as caught:  # noqa: BLE001  the other ranks are told, and it is raised below
            error = caught
            found = caught if isinstance(caught, TensorkeepError) else TensorkeepError(repr(caught), where=self.path)
        try:
            self._meet(board, found)
        except TensorkeepError as caught:
            error = error or caught
        if error is not None:
            self._give_up()
            raise error
        assert isinstance(found, Report)
        results = [WriteResult(i, size, None) for i, (_, _, size) in found.places.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, order: _Order, plan: SavePlan, planner: SavePlanner) -> Report:
        """Write this rank's file."""
        objects, by_index = {}, {item.index: item for item in plan.items}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                data = planner.resolve_data(item)
                assert isinstance(data, io.BytesIO)
                objects[item.index] = data
        share = lay_out(f"__{order.rank}_0.distcp", plan.items, objects)

        def resolve(index: Any) -> Any:
            return plain(planner.resolve_data(by_index[index]), index.fqn)  # type: ignore[arg-type]

        with explained(Path(order.folder)):
            return write(Path(order.folder), share, source_of(share, resolve), lambda _: False, socket.gethostname())[0]

    def _meet(self, board: Board, found: Report | TensorkeepError) -> None:
        """Wait for all ranks; the first one keeps what they wrote. Every rank's own error is raised by DCP."""
        verdict: TensorkeepError | None = None
        if board.rank == 0:
            try:
                reports = gathered(board, found)
                if isinstance(reports, list):
                    self._reports = reports
                else:
                    verdict = reports
            except TensorkeepError as late:
                verdict = late
            board.tell(packed(verdict))
        else:
            gathered(board, found)
            verdict = unpacked(board.tell(None))
        if verdict is not None:
            raise verdict

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the files of all ranks a checkpoint and give it its name; the first rank alone does this."""
        assert self._temporary is not None
        final = self.path
        try:
            complete(
                self._temporary, described(metadata, self._reports), self._reports, About(step_of(final.name) or 0)
            )
            with explained(final):
                self._refuse_other_files()
                if final.is_dir() and any(final.iterdir()):
                    swap_names(self._temporary, final)
                else:
                    self._temporary.rename(final)
                sync_folder(final.parent)
        finally:
            self._give_up()  # after a swap this is the checkpoint before

    def _refuse_other_files(self) -> None:
        """Refuse to replace what is no checkpoint of torch.distributed.checkpoint."""
        if not os.path.lexists(self.path):
            return
        names = [p.name for p in self.path.iterdir()] if self.path.is_dir() else [self.path.name]
        known = self.path.is_dir() and (METADATA in names or not names)
        others = [n for n in names if n not in (METADATA, MANIFEST) and not n.endswith((".distcp", ".shards.json"))]
        if self.path.is_symlink() or not known or others:
            what = f"holds {', '.join(sorted(others or names)[:4])}, which a save would replace"
            raise TensorkeepError(what, where=self.path, hint="save into a folder of its own")

    def _give_up(self) -> None:
        """Take away what has a temporary name."""
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            remove(temporary)
        with contextlib.suppress(OSError):
            self._open.close()

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process (`async_save` with one) as path and time-out; a save under way stays here."""
        return {"path": self.path, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        DurableWriter.__init__(self, state["path"], state["timeout"])


__all__: Sequence[str] = ["DurableWriter"]
