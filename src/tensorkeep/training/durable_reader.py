"""A storage reader for torch.distributed.checkpoint that compares every byte it reads with the manifest."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable, run_manifest
from tensorkeep.storage.files import explained, open_plain
from tensorkeep.storage.manifest_entries import ShardEntry, row_pieces
from tensorkeep.storage.record import DTYPES, nbytes
from tensorkeep.storage.run_folder import METADATA
from tensorkeep.storage.run_manifest import MANIFEST, Manifest
from tensorkeep.training._dcp_metadata import unpickled
from tensorkeep.training.state_files import raw

_READERS = 4  # threads
_HINT = "use the checkpoint before it"


class _Shard(NamedTuple):
    """A shard and the file that it lies in."""

    file: str
    entry: ShardEntry


class DurableReader(StorageReader):
    """Read what `DurableWriter` wrote, any part of it on any number of ranks; damage is found and the tensor named.

    A rank reads the byte ranges of its own rows, in pieces that the manifest has digests of, and compares each before
    it is used. Nothing in `.metadata` is run.

    Args:
        path: the checkpoint's folder.

    Attributes:
        bytes_read: bytes of tensors and objects that were read.

    Raises:
        TensorkeepError: the folder has no manifest (F01), lacks a file (F05) or is damaged (F02, F03, F07).

    Example:
        >>> dcp.load(state, storage_reader=DurableReader("run/step-100"))            # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.bytes_read = 0
        self._manifest: Manifest | None = None
        self._files: dict[MetadataIndex, str] = {}
        self._shards: dict[str, dict[MetadataIndex, _Shard]] = {}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder, as torch asks for it."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether this is a path on a file system."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, from `checkpoint_id` where that is given."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self._manifest, self._files, self._shards, self.bytes_read = None, {}, {}, 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read manifest and metadata, and check that all files are there and have their sizes."""
        manifest = run_manifest.read_manifest(self.path)
        run_manifest.check_sizes(self.path, manifest)
        return self.of(manifest)

    def of(self, manifest: Manifest) -> Metadata:
        """Read the metadata of a checkpoint whose manifest is known and whose files have their sizes."""
        if METADATA not in manifest.files:
            what = f"holds no {METADATA}, by its {MANIFEST}: it is no sharded checkpoint"
            raise TensorkeepError(what, where=self.path, code="F05", hint="read it with tensorkeep.read")
        size = manifest.files[METADATA].size
        image = durable.allocate(size)
        run_manifest.read_whole(self.path, METADATA, manifest, image)
        metadata = unpickled(bytes(image[:size]), self.path / METADATA)
        self._manifest, self._shards = manifest, {}
        self._files = {index: place.relative_path for index, place in metadata.storage_data.items()}
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to be done: `read_metadata` has found where everything lies."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as the planner made it."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as the planner made them."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, each piece compared with its digest before it is used."""
        found = sorted(
            ((self._shard(item.storage_index), item) for item in plan.items),
            key=lambda f: (f[0].file, f[0].entry.start),
        )
        with ExitStack() as stack:
            handles = {}
            for file in dict.fromkeys(shard.file for shard, _ in found):
                with explained(self.path / file):
                    handles[file] = open_plain(self.path / file, os.O_RDONLY)
                stack.callback(os.close, handles[file])
            work = _Reading(self.path, handles, planner)
            with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
                for read in [pool.submit(work.item, shard, item) for shard, item in found]:
                    self.bytes_read += read.result()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def files(self, plan: LoadPlan) -> list[str]:
        """List the files that a plan reads.

        Args:
            plan: as the planner made it.
        """
        return sorted({self._files[item.storage_index] for item in plan.items if item.storage_index in self._files})

    def ranges(self, plan: LoadPlan) -> list[tuple[str, int, int]]:
        """List what a plan reads of each file, in pieces that have digests: file, first byte, bytes.

        Args:
            plan: as the planner made it.
        """
        found = set()
        for item in plan.items:
            shard = self._shard(item.storage_index)
            entry = shard.entry
            row = nbytes(entry.dtype, entry.shape[1:]) if entry.shape else entry.nbytes
            some = bool(entry.shape) and entry.offset is not None
            start, end = (0, 1 << 62)
            if some:
                start, end = item.storage_offsets[0], item.storage_offsets[0] + item.lengths[0]
            for first, count in row_pieces(entry.dtype, entry.shape):
                if first < end and start < first + count:
                    found.add((shard.file, entry.start + first * row, count * row))
        return sorted(found)

    def _shard(self, index: MetadataIndex) -> _Shard:
        """Find a shard as the planner names it; what lies in a file is read when it is first asked for."""
        assert self._manifest is not None
        file, found = self._files.get(index), None
        if file is not None:
            if file not in self._shards:
                entries = run_manifest.shards_in(self.path, file, self._manifest)
                self._shards[file] = {MetadataIndex(e.tensor, e.offset): _Shard(file, e) for e in entries}
            found = self._shards[file].get(index)
        if found is None:
            what = f"{METADATA} names {index.fqn} at {index.offset}, the lists of shards do not"
            raise TensorkeepError(what, where=self.path, code="F07", hint=_HINT, tensors=[index.fqn])
        return found


class _Reading:
    """The reading of one plan, by several threads; the planner is asked by one at a time."""

    def __init__(self, path: Path, handles: Mapping[str, int], planner: LoadPlanner) -> None:
        self.path, self.handles, self.planner = path, handles, planner
        self._turn = threading.Lock()

    def item(self, shard: _Shard, item: ReadItem) -> int:
        """Read one item of the plan; returns the bytes that were read for it."""
        if item.type == LoadItemType.BYTE_IO:
            data = bytearray(shard.entry.nbytes)
            pieces = row_pieces(shard.entry.dtype, shard.entry.shape)
            for number, (first, count) in enumerate(pieces):
                self._read(shard, number, memoryview(data)[first : first + count], first)
            with self._turn:
                self.planner.load_bytes(item, io.BytesIO(data))
            return len(data)
        with self._turn:
            target = self.planner.resolve_tensor(item).detach()
        size = self._tensor(shard, item, target)
        with self._turn:
            self.planner.commit_tensor(item, target)
        return size

    def _tensor(self, shard: _Shard, item: ReadItem, target: Tensor) -> int:
        """Read the rows of a shard that are asked for, piece by piece."""
        entry, kind = shard.entry, DTYPES[shard.entry.dtype].torch
        dtype = getattr(torch, str(kind), None)
        if entry.offset is None or dtype is None or len(item.lengths) != len(entry.shape):
            what = f"{entry.tensor} is {entry.dtype}{list(entry.shape)} in {MANIFEST}, {METADATA} says another thing"
            raise TensorkeepError(what, where=self.path, code="F07", hint=_HINT, tensors=[entry.tensor])
        if target.shape != torch.Size(item.lengths):
            what = f"{entry.tensor}: {list(item.lengths)} are asked for, into {list(target.shape)}"
            raise TensorkeepError(what, where=self.path, tensors=[entry.tensor])
        if not target.numel():
            return 0
        row = nbytes(entry.dtype, entry.shape[1:]) if entry.shape else entry.nbytes
        start, rows = (item.storage_offsets[0], item.lengths[0]) if entry.shape else (0, 1)
        rest = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets[1:], item.lengths[1:]))
        size = 0
        for number, (first, count) in enumerate(row_pieces(entry.dtype, entry.shape)):
            begin, end = max(first, start), min(first + count, start + rows)
            if begin >= end:
                continue
            part = target[begin - start : end - start] if entry.shape else target
            whole = end - begin == count and part.shape[1:] == entry.shape[1:]
            straight = whole and part.device.type == "cpu" and part.dtype == dtype and part.is_contiguous()
            room = raw(part) if straight and not part.is_conj() and not part.is_neg() else None
            data = room if room is not None else memoryview(bytearray(count * row))
            self._read(shard, number, data, first * row)
            size += len(data)
            if room is None:
                piece = torch.frombuffer(data, dtype=dtype).reshape((count, *entry.shape[1:]) if entry.shape else ())
                part.copy_(piece[(slice(begin - first, end - first), *rest)] if entry.shape else piece)
        return size

    def _read(self, shard: _Shard, number: int, data: memoryview, at: int) -> None:
        """Fill `data` with piece `number` of a shard, which begins `at` bytes into it, and compare the digest."""
        entry, where, done = shard.entry, self.path / shard.file, 0
        with explained(where):
            while done < len(data):
                got = os.preadv(self.handles[shard.file], [data[done:]], entry.start + at + done)
                if not got:
                    break
                done += got
        if done < len(data):
            what = f"{entry.tensor} is truncated"
            raise TensorkeepError(what, where=where, code="F02", hint=_HINT, tensors=[entry.tensor])
        if durable.digest(data) != entry.pieces[number]:
            what = f"damaged since it was written: {entry.tensor}"
            raise TensorkeepError(what, where=where, code="F03", hint=_HINT, tensors=[entry.tensor])


__all__ = ["DurableReader"]
