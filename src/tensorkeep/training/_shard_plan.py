"""Which rank writes what of a sharded run's state: torch's planner decides, once for all saves of the same tensors."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import temporary_name
from tensorkeep.training._shard_files import Share, lay_out, plain
from tensorkeep.training.distributed import World, from_first, gathered, together
from tensorkeep.training.hosts import Hosts
from tensorkeep.training.state_files import State

_Kind = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
_LISTED = 1024  # bytes of a chunk in the lists and in `.metadata`, at most


class Part(NamedTuple):
    """This rank's part of one save.

    Attributes:
        share: the file it writes.
        tensors: the chunks that go into it, by key, where they lie while training.
        steady: keys of those that change in optimizer steps only.
        metadata: torch's description of all parts, on the first rank.
        folder: where every rank writes, under a temporary name.
        meeting: the name of this save among the ranks.
        description: `.metadata` of a save before, which is this one's as well; None where there is none yet.
        keep: takes it, on the first rank.
        needed: bytes of what this rank's host keeps.
    """

    share: Share
    tensors: dict[str, Tensor]
    steady: frozenset[str]
    metadata: Metadata | None
    folder: Path
    meeting: str
    description: bytes | None
    keep: Callable[[bytes], None]
    needed: int


class ShardPlan:
    """Plans the saves of one run; every rank has one.

    Args:
        world: this process among its peers.
        hosts: where every host keeps its own ranks' files; None: all ranks share a folder.
    """

    def __init__(self, world: World, hosts: Hosts | None = None) -> None:
        self.world, self.hosts = world, hosts
        self._sizes: list[tuple[int, int]] = []  # of each rank: bytes of its file, and chunks in it
        self._kinds: list[Any] | None = None
        self._metadata: Metadata | None = None
        self._share: Share | None = None
        self._description: bytes | None = None
        self._known: dict[str, tuple[Tensor, _Kind]] = {}  # of the state before, by name
        self._chunks: dict[str, Tensor] = {}  # of the save before, by key
        self._wanted: dict[str, WriteItem] = {}  # what each key is to the planner

    def _keep(self, description: bytes) -> None:
        self._description = description

    def part(self, run: Path, state: State, document: bytes) -> Part:
        """Find this rank's part of a state, and make the folder for all; every rank must call it.

        Tensors stay where they are. Ranks exchange the plan where tensors are not those of the save before.

        Args:
            run: the run's folder.
            state: what to save, its tensors in shards.
            document: state.json, for the room it needs.

        Raises:
            TensorkeepError: on every rank: a tensor cannot be stored, the disk is full or fails.
        """
        with torch.no_grad():  # this rank's part of a tensor then costs nothing
            planner = self._planned(state)
        share = self._share
        assert share is not None
        step, needed = state.document["step"], sum(self._kept()) + len(document)

        def place() -> tuple[str, str, bool]:
            folder = temporary_name(run_folder.folder_of(run, step))
            with explained(run):
                run_folder.make_folder(folder.parent)
                run_folder.room_for(run, needed)
                folder.mkdir()
            return str(folder), f"{folder.name}/{secrets.token_hex(8)}", self._description is not None

        folder, meeting, known = self._place(place)
        with torch.no_grad():
            self._chunks = {key: self._chunk(planner, key, item.at.fqn) for key, item in share.items.items()}
        tensors = dict(self._chunks)
        trained = {f"model.{name.rpartition('/')[0]}" for name in state.optimizer}
        steady = frozenset(
            k for k, i in share.items.items() if not i.at.fqn.startswith("model.") or i.at.fqn in trained
        )
        description = (self._description or b"") if known else None
        return Part(share, tensors, steady, self._metadata, Path(folder), meeting, description, self._keep, needed)

    def sizes(self, state: State) -> list[int]:
        """Tell how many bytes each rank's file will have, and what comes beside them; every rank must call it.

        The plan is kept: a save of the same names, dtypes and shapes needs no other.

        Args:
            state: as `part` takes it, but tensors may lie on meta.
        """
        with torch.no_grad():
            self._planned(state)
        return self._kept()

    def _kept(self) -> list[int]:
        """Bytes of each rank's file that this rank's host keeps, copies of another's with it, and what comes beside."""
        ranks: Sequence[int] = range(self.world.size)
        if self.hosts is not None:
            own = self.hosts.ranks(self.hosts.mine)
            ranks = [*own, *(source for rank in own for source in self.hosts.copied_from(rank))]
        chunks = sum(count for _, count in self._sizes)
        return [*(self._sizes[rank][0] for rank in ranks), _LISTED * chunks + (1 << 20)]

    def _place(self, place: Callable[[], tuple[str, str, bool]]) -> tuple[str, str, bool]:
        """Make the folder on the first rank, or on the first of each host; all go by the first rank's meeting."""
        hosts = self.hosts
        if hosts is None:
            return from_first(self.world, place)
        made = together(self.world, lambda: place() if hosts.leads else None)
        told = gathered(self.world, made)
        known = all(entry[2] for entry in told if entry is not None)
        return told[hosts.ranks(hosts.mine)[0]][0], told[0][1], known

    def _planned(self, state: State) -> DefaultSavePlanner:
        """Set up a planner of a state, and plan anew where tensors are not those of the plan before."""
        nested = {k: v for k, v in (("model", state.model), ("optimizer", state.optimizer), ("ema", state.ema)) if v}
        flat = {f"{part}.{name}": tensor for part, own in nested.items() for name, tensor in own.items()}
        known = {name: self._seen(name, tensor) for name, tensor in flat.items()}
        kinds = [(name, kind) for name, (_, kind) in known.items()]
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(flat, is_coordinator=self.world.first)
        if not all(gathered(self.world, kinds == self._kinds)):
            whole = DefaultSavePlanner()  # what it flattens is told to whoever reads the checkpoint
            whole.set_up_planner(nested, is_coordinator=self.world.first)
            self._chunks = {}
            self._agree(whole)
            self._kinds = kinds
        self._known = known
        return planner

    def _seen(self, name: str, tensor: Tensor) -> tuple[Tensor, _Kind]:
        """Return a tensor with what the plan depends on, which for the very tensor of the state before is known."""
        known = self._known.get(name)
        return known if known is not None and known[0] is tensor else (tensor, _kind(tensor))

    def _chunk(self, planner: DefaultSavePlanner, key: str, name: str) -> Tensor:
        """Return a chunk of a tensor where it lies, that of the save before where it lies there still."""
        before, part = self._chunks.get(key), _local(self._known[name][0])
        if before is not None and before.data_ptr() == part.data_ptr() and before.stride() == part.stride():
            return before  # dtype and shape are those of the plan
        return plain(planner.resolve_data(self._wanted[key]), name)  # type: ignore[arg-type]

    def _agree(self, planner: DefaultSavePlanner) -> None:
        """Let the first rank make one plan of all ranks', so that what several hold is written once."""
        world, error = self.world, None
        plans: list[Any] | None = [None] * world.size if world.first else None
        dist.gather_object(planner.create_local_plan(), plans)
        if plans is not None:
            try:
                plans, self._metadata = planner.create_global_plan(plans)
            except ValueError as wrong:
                error = TensorkeepError(f"the ranks' tensors make no whole: {wrong}", where="checkpoint")
                plans = [error] * world.size
        own: list[Any] = [None]
        dist.scatter_object_list(own, plans)
        if isinstance(own[0], TensorkeepError):
            raise own[0]
        self._description = None
        self._share = lay_out(f"__{world.rank}_0.distcp", own[0].items, {})
        by_index = {item.index: item for item in own[0].items}
        self._wanted = {key: by_index[item.at] for key, item in self._share.items.items()}
        self._sizes = gathered(world, (self._share.layout.size, len(self._share.items)))


def _kind(tensor: Tensor) -> _Kind:
    """What the plan depends on: dtype, sizes of the whole and of this rank's part."""
    return tensor.dtype, tuple(tensor.shape), tuple(_local(tensor).shape)


def _local(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
