"""The tensors of a checkpoint that lies whole in files, read by the ranks of a sharded run each byte once.

The manifest has a digest of every 16 MiB of a file, and what a rank needs of a tensor rarely begins or ends with one.
So each piece of 16 MiB is read, and compared, by one rank: the one that needs most of it, or the least busy of those
that need about as much. What others need of it is handed to them, a bounded number of bytes at a time. In a large model
most pieces are needed by the rank that reads them, and little is handed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import safetensors
from tensorkeep.storage import durable, run_manifest
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.manifest_entries import TensorEntry
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.run_manifest import MANIFEST, Manifest
from tensorkeep.training.distributed import World, gathered
from tensorkeep.training.fsdp import own_runs
from tensorkeep.training.state_files import raw

_FLIGHT = 16 << 20  # bytes that a rank may be handed at once
_SMALLEST = 1 << 20
_ALIKE = 0.9  # ranks that need this much of what the neediest does may read a piece as well

Array = np.ndarray[Any, Any]


class _Piece(NamedTuple):
    """16 MiB of a file, or its rest; `begin` and `end` are counted over all files, one behind the other."""

    file: str
    number: int
    begin: int
    end: int


class WholeFiles:
    """The tensors of a checkpoint whose files hold them whole, not yet read.

    Args:
        folder: the checkpoint.
        manifest: its manifest, whose files have their sizes.
        files: part of the state -> the file that holds it.
        world: this process among those that share the reading.

    Attributes:
        parts: part -> name -> the tensor, on meta.
        bytes_read: bytes of files that this process read.
        bytes_handed: bytes that it handed to others.
        fetch: None: every host has the files (see `Shards`).

    Raises:
        TensorkeepError: the header of a file is not what the manifest says (F07), or torch lacks a dtype.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: Mapping[str, str], world: World) -> None:
        self.folder, self.bytes_read, self.bytes_handed, self.fetch = folder, 0, 0, None
        self._manifest, self._files, self._world = manifest, dict(files), world
        sizes = [manifest.files[file].size for file in files.values()]
        self._starts = dict(zip(files.values(), accumulate([0, *sizes])))
        self.parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("model", "optimizer", "ema")}
        for part, file in files.items():
            entries = manifest.tensors.get(file, {})
            records, _ = safetensors.read_header(LocalFolder(folder), file)
            found = {r.name: (r.dtype, r.shape, r.blocks[0].start if r.blocks else 0) for r in records}
            if found != {n: (e.dtype, e.shape, e.start) for n, e in entries.items()}:
                raise TensorkeepError(f"the header is not what {MANIFEST} says", where=folder / file, code="F07")
            self.parts[part] = {
                name: torch.empty(entry.shape, dtype=_dtype(entry, folder / file, name), device="meta")
                for name, entry in entries.items()
            }

    def read(self, into: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fill tensors, whole or in shards; every byte of the files is compared with its digest by one of the ranks.

        Every rank must call it.

        Args:
            into: part -> name -> the tensor to fill, of the stored shape and dtype.

        Raises:
            TensorkeepError: on the rank that found it: a piece is damaged (F03), or cannot be read. Tensors may then
                be half filled.
        """
        own = self._wanted(into)
        wanted = gathered(self._world, own.places)
        plan = _plan(self._pieces(), wanted)
        width = max(_SMALLEST, min(durable.CHUNK, _FLIGHT // self._world.size))
        mine = [turns[self._world.rank] for turns in plan]
        wrong: set[str] = set()
        rooms = cycle([torch.from_numpy(np.zeros(durable.CHUNK, np.uint8)) for _ in range(2)])
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._read, mine[0], next(rooms)) if mine else None
            for number, turns in enumerate(plan):
                data, damaged = _result(coming)
                wrong |= {piece.file for piece in (mine[number],) if piece is not None and damaged}
                coming = ahead.submit(self._read, mine[number + 1], next(rooms)) if number + 1 < len(plan) else None
                for at in range(0, durable.CHUNK, width):
                    parts = [None if p is None or p.begin + at >= p.end else _cut(p, at, width) for p in turns]
                    if any(part is not None for part in parts):
                        self._share(data, at, parts, wanted, own)
        for file in sorted(wrong):  # names the tensors
            run_manifest.read_whole(self.folder, file, self._manifest)
            raise TensorkeepError("was read with errors, and then without", where=self.folder / file, code="F03")

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """Read everything, as whole tensors on the CPU; every rank must call it."""
        made = {p: {n: torch.empty_like(t, device="cpu") for n, t in own.items()} for p, own in self.parts.items()}
        self.read(made)
        return made

    def _wanted(self, into: Mapping[str, Mapping[str, Tensor]]) -> _Room:
        """Where each run of bytes that this rank needs lies, and the memory that it goes into."""
        found = []
        for part, file in self._files.items():
            for name, target in into[part].items():
                start, width = self._starts[file] + self._manifest.tensors[file][name].start, target.element_size()
                for first, out in own_runs(target):
                    begin = start + first * width
                    found.append(((begin, begin + out.numel() * width), out.view(torch.uint8)))
        found.sort(key=lambda run: run[0])
        return _Room(np.array([place for place, _ in found], np.int64).reshape(-1, 2), [out for _, out in found])

    def _pieces(self) -> list[_Piece]:
        """Every 16 MiB of the files."""
        sizes, step = {file: self._manifest.files[file].size for file in self._starts}, durable.CHUNK
        return [
            _Piece(file, begin // step, self._starts[file] + begin, self._starts[file] + min(begin + step, size))
            for file, size in sizes.items()
            for begin in range(0, size, step)
        ]

    def _read(self, piece: _Piece | None, room: Tensor) -> tuple[Tensor, bool]:
        """Read a piece into memory of 16 MiB; gives its bytes, and whether they are not those of its digest."""
        if piece is None:
            return room[:0], False
        room = room[: piece.end - piece.begin]
        view = raw(room)
        LocalFolder(self.folder).read_into(piece.file, piece.number * durable.CHUNK, view)
        self.bytes_read += len(view)
        return room, durable.digest(view) != self._manifest.files[piece.file].chunks[piece.number]

    def _share(
        self, data: Tensor, at: int, parts: Sequence[_Piece | None], wanted: Sequence[Array], own: _Room
    ) -> None:
        """Hand to each rank what it needs of the parts that are being read, one a rank."""
        rank, mine = self._world.rank, parts[self._world.rank]
        given = [list(_overlaps(mine, theirs)) for theirs in wanted]
        taken = [list(_overlaps(part, own.places)) for part in parts]
        there = [data[b - mine.begin + at : e - mine.begin + at] for _, b, e in given[rank]] if mine else []
        for (index, begin, end), piece in zip(taken[rank], there):
            own.put(index, begin, end, piece)
        if self._world.size == 1:
            return
        others = [r for r in range(self._world.size) if r != rank]
        sent = [data[b - mine.begin + at : e - mine.begin + at] for r in others for _, b, e in given[r]] if mine else []
        sizes = [0 if r == rank else sum(e - b for _, b, e in given[r]) for r in range(self._world.size)]
        due = [0 if r == rank else sum(e - b for _, b, e in taken[r]) for r in range(self._world.size)]
        got = torch.empty(sum(due), dtype=torch.uint8)
        torch.distributed.all_to_all_single(got, torch.cat(sent) if sent else data[:0], due, sizes)
        self.bytes_handed += sum(sizes)
        done = 0
        for index, begin, end in (run for r in others for run in taken[r]):
            own.put(index, begin, end, got[done : done + end - begin])
            done += end - begin


class _Room(NamedTuple):
    """What a rank needs: first byte and end of each run `[runs, 2]`, sorted; and the memory of each, as bytes."""

    places: Array
    memory: list[Tensor]

    def put(self, index: int, begin: int, end: int, data: Tensor) -> None:
        """Copy bytes of a file to where they belong in run `index`."""
        first = int(self.places[index, 0])
        self.memory[index][begin - first : end - first].copy_(data)


def _dtype(entry: TensorEntry, where: Path, name: str) -> torch.dtype:
    """Torch's dtype of a tensor."""
    found = getattr(torch, str(DTYPES[entry.dtype].torch), None)
    if not isinstance(found, torch.dtype) or entry.dtype == "F4":
        raise TensorkeepError(f"torch has no dtype for {entry.dtype}", where=f"{where}: {name}")
    return found


def _cut(piece: _Piece, at: int, width: int) -> _Piece:
    """A part of a piece, `width` bytes or its rest."""
    begin = piece.begin + at
    return piece._replace(begin=begin, end=min(begin + width, piece.end))


def _result(coming: Future[tuple[Tensor, bool]] | None) -> tuple[Tensor, bool]:
    """What was read ahead; zeros where that failed, which is said at the end, since others wait for this rank."""
    try:
        return coming.result() if coming is not None else (torch.empty(0, dtype=torch.uint8), False)
    except (TensorkeepError, OSError):
        return torch.zeros(durable.CHUNK, dtype=torch.uint8), True


def _overlaps(piece: _Piece | None, runs: Array) -> Iterator[tuple[int, int, int]]:
    """The runs that lie in a piece: index, first byte and end of what does."""
    if piece is None:
        return
    first, last = np.searchsorted(runs[:, 1], piece.begin, "right"), np.searchsorted(runs[:, 0], piece.end, "left")
    for index in range(int(first), int(last)):
        yield index, max(int(runs[index, 0]), piece.begin), min(int(runs[index, 1]), piece.end)


def _plan(pieces: Sequence[_Piece], wanted: Sequence[Array]) -> list[list[_Piece | None]]:
    """Choose who reads what: for each turn a piece of every rank, None where a rank has none left.

    What nobody needs (headers, and tensors that are not in the run) is read as well, for its digest's sake.
    """
    edges = np.array([[piece.begin, piece.end] for piece in pieces], np.int64).reshape(-1, 2)
    needs = np.stack([_before(edges[:, 1], runs) - _before(edges[:, 0], runs) for runs in wanted])  # [ranks, pieces]
    able = needs >= _ALIKE * needs.max(0)
    load = np.zeros(len(wanted), np.int64)
    queues: list[list[_Piece]] = [[] for _ in wanted]
    for number, piece in enumerate(pieces):
        rank = int(np.where(able[:, number], load, np.iinfo(np.int64).max).argmin())
        queues[rank].append(piece)
        load[rank] += 1
    turns = max((len(queue) for queue in queues), default=0)
    return [[queue[turn] if turn < len(queue) else None for queue in queues] for turn in range(turns)]


def _before(places: Array, runs: Array) -> Array:
    """How many bytes of runs lie before each place."""
    if not len(runs):
        return np.zeros(len(places), np.int64)
    done = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
    at = np.searchsorted(runs[:, 0], places, "right")  # runs that begin before it
    within = np.where(at > 0, np.minimum(places, runs[at - 1, 1]) - runs[at - 1, 0], 0)
    return done[np.maximum(at - 1, 0)] * (at > 0) + within
