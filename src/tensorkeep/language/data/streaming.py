"""A corpus that is read as it is needed: tokenized on the way, mixed within a buffer, its position exact.

The files are divided into units (4 MiB of a file of lines, a row group of a parquet file, any other file whole), and
the units are dealt to lanes. A lane reads its units one after another and makes rows of tokens, a block of documents at
a time; row p of the whole stream is the next one of lane `p % lanes`. So the stream is the same for any number of ranks
and workers, each of which reads the lanes that it needs rows of, and where a lane stands is a few numbers: its unit,
the record that its block begins with, the row in the block, the token in a document.

Mixed are the units of an epoch, and the documents of a block. A lane that has come to its end begins again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.packing import Packing, plan
from tensorkeep.language.data.sources import units_of
from tensorkeep.language.data.tokens import Encoded
from tensorkeep.training.randomness import derive, order

UNIT, SMALLEST_UNIT = 4 << 20, 64 << 10  # bytes of a file of lines
LANES = (192, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # multiples of as many numbers of ranks as can be
_UNITS, _MOST = 4, 1 << 16  # units that a lane has at least; units of a corpus, about, at most
_BLOCK = 256 << 20  # letters of all lanes' blocks together, about

Array = np.ndarray[Any, Any]


class Reader(Protocol):
    """Reads records of files, and makes tokens of them; worker processes get a copy."""

    def records(self, path: Path, begin: int, end: int | None) -> Iterator[Any]:
        """Read the records of a stretch of a file, as `sources.documents` takes it."""
        ...

    def encode(self, records: Sequence[Any]) -> tuple[list[Encoded], Counter[str]]:
        """Tokenize records; also counts what is left out."""
        ...


class Unit(NamedTuple):
    """A stretch of a file: bytes of lines, row groups of a table, or all of it (`end` None)."""

    file: int
    begin: int
    end: int | None


class Position(NamedTuple):
    """Where a lane stands before its next row.

    Attributes:
        made: rows that it has made.
        epoch: times that it has come to its end.
        unit: which of its units its block begins in.
        record: the record of that unit which its block begins with.
        at: the next row of the block; of packing `concatenate` the document that it begins in.
        offset: the token of that document.
        seen: whether this epoch had a document so far.
        wide: whether the lane reads all units, since its own have no document.
    """

    made: int = 0
    epoch: int = 0
    unit: int = 0
    record: int = 0
    at: int = 0
    offset: int = 0
    seen: int = 0
    wide: int = 0


class Row(NamedTuple):
    """A row of tokens: ids and whether each counts `[t]`, tokens of each segment; where its lane stands after it."""

    ids: Array
    counted: Array
    lengths: list[int]
    lane: int
    after: Position
    left: Counter[str]


@dataclass(frozen=True, eq=False)
class Corpus:
    """What a stream is made of and how; the same on every rank and at every start.

    Args:
        files: in order.
        size: bytes of a unit of a file of lines.
        lanes: how many there are.
        reader: reads records and makes tokens of them.
        vocabulary: number of ids.
        form: how files are read, the recipe's `format`.
        length: tokens of a row.
        packing: how rows are made, of the documents of a block or (concatenate) of all in a row.
        buffer: documents that are mixed with each other, over all lanes; 0: none are, and units keep their order.
        seed: of the mixing.
    """

    files: tuple[Path, ...]
    size: int
    lanes: int
    reader: Reader
    vocabulary: int
    form: str
    length: int
    packing: Packing
    buffer: int
    seed: int
    units: list[Unit] = field(init=False)

    def __post_init__(self) -> None:
        found = [Unit(n, *u) for n, path in enumerate(self.files) for u in units_of(path, self.form, self.size)]
        object.__setattr__(self, "units", found)

    def turns(self, lane: int, epoch: int, wide: bool) -> list[int]:
        """The units of a lane in an epoch, in order."""
        mixed = order(derive(self.seed, 1), epoch, len(self.units)) if self.buffer else np.arange(len(self.units))
        own = np.roll(mixed, -lane) if wide else mixed[lane :: self.lanes]
        return [int(unit) for unit in own]


def divided(files: Sequence[Path], form: str) -> tuple[int, int]:
    """Choose how large units are and how many lanes there are.

    Args:
        files: of the corpus.
        form: how they are read.

    Returns:
        Bytes of a unit, and lanes.
    """
    total = sum(path.stat().st_size for path in files)
    size = min(max(UNIT, total // _MOST), max(SMALLEST_UNIT, total // (LANES[0] * _UNITS)))
    count = sum(len(units_of(path, form, size)) for path in files)
    return size, next(lanes for lanes in LANES if lanes * _UNITS <= count or lanes == 1)


class Lane:
    """Makes rows of a part of the corpus, one after another.

    Args:
        corpus: the whole.
        number: of the lane.
        start: where it stands.
    """

    def __init__(self, corpus: Corpus, number: int, start: Position) -> None:
        self.corpus, self.number, self.now = corpus, number, start
        self._block: _Block | None = None
        self._reader: tuple[tuple[int, int, int], Iterator[Any]] | None = None
        self._left: Counter[str] = Counter()
        self._turns: dict[tuple[int, bool], list[int]] = {}

    def row(self) -> Row:
        """Make the next row.

        Raises:
            TensorkeepError: a file cannot be read or is not what it was, or the corpus has no document.
        """
        segments = self._whole() if self.corpus.packing == "concatenate" else self._of_block()
        self.now = self.now._replace(made=self.now.made + 1)
        left, self._left = self._left, Counter()
        ids, counted = (np.concatenate([segment[k] for segment in segments]) for k in (0, 1))
        return Row(ids, counted, [len(s[0]) for s in segments], self.number, self.now, left)

    def _of_block(self) -> list[tuple[Array, Array]]:
        """The segments of the next row of a block."""
        while True:
            block = self._opened()
            if self.now.at < len(block.rows):
                self.now = self.now._replace(at=self.now.at + 1)
                return block.rows[self.now.at - 1]
            self._go_on(block)

    def _whole(self) -> list[tuple[Array, Array]]:
        """The segments of a full row: documents are cut where it ends, and go on in the next with one token more."""
        segments: list[tuple[Array, Array]] = []
        while not segments:
            room = self.corpus.length
            while room:
                block = self._opened()
                if self.now.at >= len(block.documents):
                    self._go_on(block)
                    continue
                ids, counted = block.documents[self.now.at]
                begin = self.now.offset
                end = min(begin + room, len(ids))
                if end - begin > 1:  # a single token has nothing to predict
                    segments.append((ids[begin:end], counted[begin:end]))
                room -= end - begin
                self.now = self.now._replace(offset=end)
                if end == len(ids):
                    self.now = self.now._replace(at=self.now.at + 1, offset=0)
            self.now = self.now._replace(offset=max(self.now.offset - 1, 0))
        return segments

    def _opened(self) -> _Block:
        """The block that the lane stands in; it is read where it is not there."""
        if self._block is None:
            self._block = self._read()
            if self._block.documents and not self.now.seen:
                self.now = self.now._replace(seen=1)
        return self._block

    def _go_on(self, block: _Block) -> None:
        """Stand at the beginning of the next block."""
        epoch, unit, record = block.after
        now = self.now._replace(epoch=epoch, unit=unit, record=record, at=0, offset=0)
        if epoch != self.now.epoch:
            if not now.seen and now.wide:
                hint = "no document has a token that counts"
                raise TensorkeepError("the data is empty", where="data.files", hint=hint)
            now = now._replace(seen=0, wide=int(now.wide or not now.seen))
        self.now, self._block = now, None

    def _read(self) -> _Block:
        """Read and tokenize the documents of a block, and lay them out in rows."""
        corpus, begun = self.corpus, self.now[1:4]
        most = max(-(-corpus.buffer // corpus.lanes), 1) if corpus.buffer else 64
        records, after = self._records(most, _BLOCK // corpus.lanes)
        made, left = corpus.reader.encode(records)
        self._left += left
        documents = [_arrays(one, corpus.vocabulary) for one in made if len(one.ids) > 1]
        if corpus.buffer:
            key = derive(corpus.seed, 2, self.number, *begun)
            documents = [documents[k] for k in order(key, 0, len(documents)).tolist()]
        rows = [] if corpus.packing == "concatenate" or not documents else _rows(corpus, documents, begun)
        return _Block(documents, rows, after)

    def _records(self, most: int, size: int) -> tuple[list[Any], tuple[int, int, int]]:
        """Read the records of a block: so many, or so many letters; and say where the next block begins."""
        epoch, unit, record = self.now[1:4]
        key = epoch, bool(self.now.wide)
        if key not in self._turns:
            self._turns = {key: self.corpus.turns(self.number, *key)}
        turns = self._turns[key]
        found: list[Any] = []
        held = 0
        while unit < len(turns):
            reader = self._at(epoch, unit, record, turns[unit])
            for one in reader:
                found.append(one)
                record, held = record + 1, held + _weight(one)
                if len(found) >= most or held >= size:
                    self._reader = (epoch, unit, record), reader
                    return found, (epoch, unit, record)
            unit, record = unit + 1, 0
        return found, (epoch + 1, 0, 0)

    def _at(self, epoch: int, unit: int, record: int, which: int) -> Iterator[Any]:
        """The records of a unit from one on; those before are read over where the last block did not end there."""
        held, self._reader = self._reader, None
        if held is not None and held[0] == (epoch, unit, record):
            return held[1]
        file, begin, end = self.corpus.units[which]
        found = self.corpus.reader.records(self.corpus.files[file], begin, end)
        return itertools.islice(found, record, None) if record else found


class _Block(NamedTuple):
    """Documents that are mixed with each other, the rows made of them, and where the next block begins."""

    documents: list[tuple[Array, Array]]
    rows: list[list[tuple[Array, Array]]]
    after: tuple[int, int, int]


def _rows(
    corpus: Corpus, documents: list[tuple[Array, Array]], begun: tuple[int, ...]
) -> list[list[tuple[Array, Array]]]:
    """Lay the documents of a block out in rows."""
    if corpus.packing == "none":
        return [[document] for document in documents]
    ids, counted = (np.concatenate([document[k] for document in documents]) for k in (0, 1))
    laid = plan(np.cumsum([0, *(len(document[0]) for document in documents)]), corpus.length, corpus.packing)
    turns = order(derive(corpus.seed, 3, *begun), 0, len(laid)).tolist() if corpus.buffer else range(len(laid))
    return [[(ids[a:b], counted[a:b]) for a, b in laid.segments(row)] for row in turns]


def _arrays(one: Encoded, vocabulary: int) -> tuple[Array, Array]:
    """A document's ids, which must be the model's, and which of them count."""
    ids = np.asarray(one.ids, np.int32)
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        what = f"the tokenizer gave id {int(ids.max())}, the model has {vocabulary} rows"
        raise TensorkeepError(what, where="tokenizer", code="C02", hint="take the tokenizer that belongs to the model")
    return ids, np.ones(len(ids), bool) if one.marks is None else np.asarray(one.marks, bool)


def _weight(record: Any) -> int:
    """How many letters a record has, about."""
    if isinstance(record, str):
        return len(record)
    messages = getattr(record, "messages", None)
    return sum(len(str(message.get("content"))) for message in messages) if messages else len(str(record))
