"""A streamed corpus as the data of a job: each rank its rows, made ahead in workers, and its place in a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.batches import make_sample
from tensorkeep.language.data.streaming import Corpus, Lane, Position, Row, divided
from tensorkeep.storage.files import explained
from tensorkeep.training.batches import Positions
from tensorkeep.training.distributed import World, from_first, gathered, together
from tensorkeep.training.interruption import leave_to_the_parent

_EDGE = 64 << 10  # bytes at both ends of a file that are compared
_AHEAD = 32  # rows that a worker makes ahead

Entry = tuple[str, int, str]  # of a file: path, bytes, digest of both ends
Places = dict[int, Position]


def entry_of(path: Path) -> Entry:
    """Describe a file by its path, size and a digest of its first and last 64 KiB."""
    with explained(path), path.open("rb") as file:
        size = path.stat().st_size
        state = xxhash.xxh3_128(file.read(_EDGE))
        file.seek(max(size - _EDGE, 0))
        state.update(file.read(_EDGE))
    return str(path), size, state.hexdigest()


class StreamedData:
    """Rows of a corpus in the order of the stream (see `data.streaming`); its length is not known.

    Args:
        corpus: its files, units and lanes are those of the first rank, or after `go_to` those of the checkpoint.
        settings: what else decides its rows.
        world: this process among its peers; every rank must call this.
        remark: is told what begins again, is left out, or was added to the files.

    Raises:
        TensorkeepError: a rank does not see the files as the first one does.
    """

    def __init__(
        self, corpus: Corpus, settings: Mapping[str, Any], world: World, remark: Callable[[str], None]
    ) -> None:
        self.world, self.remark, self.settings = world, remark, dict(settings)
        self.entries: list[Entry] = from_first(world, lambda: [entry_of(path) for path in corpus.files])
        self.corpus = corpus
        together(world, self._same_files)
        self.places: Places = {}
        self.kept: dict[int, Places] = {}
        self.told = set[str]()

    def _same_files(self) -> None:
        """Refuse files that are not those of the entries."""
        for path, size, digest in self.entries:
            found = entry_of(Path(path))
            if found != (path, size, digest):
                what = f"had {size:,} bytes, has {found[1]:,}" if found[1] != size else "holds other data than before"
                raise TensorkeepError(
                    what, where=path, code="R04", hint="a run goes on with the files that it began with"
                )

    def __len__(self) -> int:
        return 0

    def fingerprint(self) -> str:
        """A text that changes with the tokenizer and the way rows are made; files are compared in `go_to`."""
        text = json.dumps({"streaming": 1, **self.settings}, sort_keys=True, default=str)
        return xxhash.xxh3_128(text.encode()).hexdigest()

    def rows(self, positions: Positions, workers: int) -> Iterator[dict[str, Any]]:
        """Give this rank's samples in order, made ahead in so many processes."""
        lanes, world = self.corpus.lanes, positions.world
        apart = lanes % world == 0  # then each lane has one rank
        count = max(min(workers, lanes // world if apart else lanes), 1)
        sources = [_Rows(self.corpus, dict(self.places), positions, apart, n, count) for n in range(count)]
        if workers:  # a tokenizer's own threads do not survive a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        made = [iter(_ahead(source)) if workers else iter(source) for source in sources]
        for place in positions:
            row = next(made[sources[0].of(place % lanes)])
            self._took(row)
            yield make_sample(row.ids, row.counted, row.lengths)

    def _took(self, row: Row) -> None:
        """Keep where a row leaves its lane, and say once what there is to say."""
        before = self.places.get(row.lane, Position())
        self.places[row.lane] = row.after
        if row.after.epoch > before.epoch and row.after.epoch == 1:
            self._say("again", f"data.streaming: a lane of {self.corpus.lanes} has come to its end and begins again")
        if row.after.wide > before.wide:
            self._say("wide", "data.streaming: a lane whose units hold no document reads those of others as well")
        if row.left["idle"]:
            self._say("idle", f"records with no answer within {self.corpus.length} tokens are left out")
        if row.left["lost"]:
            what = f"tokens beyond a row of {self.corpus.length} are left out; data.packing: concatenate keeps them"
            self._say("lost", what)

    def _say(self, key: str, line: str) -> None:
        if key not in self.told:
            self.told.add(key)
            self.remark(line)

    def note(self, samples: int) -> None:
        """Keep where the lanes stand; of the last updates alone, since one may be fetched and not made."""
        self.kept[samples] = dict(self.places)
        for old in sorted(self.kept)[:-3]:
            del self.kept[old]

    def state_at(self, samples: int) -> dict[str, Any]:
        """Give the files, how they are divided, and where each lane stands; every rank calls it."""
        places: Places = {}
        for own in gathered(self.world, self.kept.get(samples, self.places)):
            for lane, place in own.items():
                places[lane] = max(place, places.get(lane, place))
        epoch = min((places.get(lane, Position()).epoch for lane in range(self.corpus.lanes)), default=0)
        return {
            "epoch": epoch,
            "files": [list(entry) for entry in self.entries],
            "unit": self.corpus.size,
            "lanes": self.corpus.lanes,
            "places": {str(lane): list(place) for lane, place in sorted(places.items())},
        }

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_at` was called, with the files of then; what was added since is said and left out.

        Raises:
            TensorkeepError: a file is gone or another (R04, F05), or the state makes no sense (F07).
        """
        now = {entry[0] for entry in self.entries}
        entries, places, size, lanes = _checked(state)
        self.entries = entries
        together(self.world, self._same_files)
        added = sorted(now - {entry[0] for entry in entries})
        if added:
            more = f" and {len(added) - 3} more" if len(added) > 3 else ""
            what = (
                f"{len(added)} files that were not there when the run began are left out: {', '.join(added[:3])}{more}"
            )
            self.remark(f"data.files: {what}; a new run reads them")
        self.corpus = replace(self.corpus, files=tuple(Path(e[0]) for e in entries), size=size, lanes=lanes)
        self.places, self.kept = places, {}


def _checked(state: Mapping[str, Any]) -> tuple[list[Entry], Places, int, int]:
    """The parts of a position from a checkpoint; F07 where they make no sense."""
    try:
        entries = [(str(path), int(count), str(digest)) for path, count, digest in state["files"]]
        places = {int(n): Position(*(int(v) for v in place)) for n, place in state["places"].items()}
        size, lanes = int(state["unit"]), int(state["lanes"])
        numbers = [size - 1, lanes - 1, *places, *(n for place in places.values() for n in place)]
        whole = all(len(place) == len(Position._fields) for place in state["places"].values())
        sound = whole and min(numbers) >= 0 and max(places, default=0) < lanes
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise TensorkeepError("makes no sense", where="checkpoint: flow", code="F07")
    return entries, places, size, lanes


class _Rows(IterableDataset[Row]):
    """The rows of some lanes that one rank needs, in the order in which it needs them."""

    def __init__(
        self, corpus: Corpus, places: Places, positions: Positions, apart: bool, worker: int, workers: int
    ) -> None:
        self.corpus, self.places, self.positions = corpus, places, positions
        self.step = positions.world if apart else 1
        self.worker, self.workers = worker, workers

    def of(self, lane: int) -> int:
        """Which worker makes a lane's rows."""
        return lane // self.step % self.workers

    def __iter__(self) -> Iterator[Row]:
        lanes: dict[int, Lane] = {}
        for position in self.positions:
            number, wanted = position % self.corpus.lanes, position // self.corpus.lanes
            if self.of(number) != self.worker:
                continue
            if number not in lanes:
                lanes[number] = Lane(self.corpus, number, self.places.get(number, Position()))
            lane = lanes[number]
            while lane.now.made < wanted:  # another rank's
                lane.row()
            yield lane.row()


def _ahead(source: _Rows) -> DataLoader[Row]:
    """Make rows in a process of its own."""
    return DataLoader(
        source,
        batch_size=None,
        num_workers=1,
        prefetch_factor=_AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=_alone,
        generator=torch.Generator().manual_seed(0),  # or it draws from the process's own
    )


def _as_it_is(row: Any) -> Any:
    return row


def _alone(_worker: int) -> None:
    """Called in each worker as it starts."""
    leave_to_the_parent()


def begun(corpus_of: Callable[[int, int], Corpus], files: tuple[Path, ...], form: str, world: World) -> Corpus:
    """Make a corpus whose units and lanes the first rank chooses for all."""
    size, lanes = from_first(world, lambda: divided(files, form))
    return together(world, lambda: corpus_of(size, lanes))


__all__ = ["StreamedData", "begun"]
