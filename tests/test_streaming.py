"""A streamed corpus: the same rows as unbroken from any position, on any number of ranks and workers; nothing twice."""

from __future__ import annotations

import gzip
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorkeep as tk
from tensorkeep.language._flow import StreamedData
from tensorkeep.language.data import streaming
from tensorkeep.language.data.sources import expanded
from tensorkeep.language.data.streaming import Corpus, Lane, Position, divided
from tensorkeep.language.data.texts import records_of
from tensorkeep.language.data.tokens import Encoded
from tensorkeep.training.batches import Positions, streamed
from tensorkeep.training.distributed import World


class Bytes:
    """Tokens are the bytes of a text; counts the records that are tokenized."""

    def __init__(self) -> None:
        self.read = Counter[str]()

    def records(self, path: Path, begin: int, end: int | None) -> Iterator[Any]:
        return records_of(path, "pretrain", "auto", begin, end)

    def encode(self, records: Sequence[Any]) -> tuple[list[Encoded], Counter[str]]:
        self.read.update(records)
        return [Encoded(list(str(text).encode())) for text in records], Counter()


def written(folder: Path, count: int = 300, files: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(files):
        lines = [json.dumps({"text": f"<{k:05}" + "x" * (k % 23) + ">"}) for k in range(number, count, files)]
        found.append(folder / f"{number}.jsonl")
        found[-1].write_text("\n".join(lines) + "\n")
    return found


def corpus(files: list[Path], packing: Any = "concatenate", buffer: int = 40, seed: int = 3, **fields: Any) -> Corpus:
    size, lanes = fields.pop("size", 512), fields.pop("lanes", 4)
    return Corpus(tuple(files), size, lanes, Bytes(), 256, "auto", 32, packing, buffer, seed, **fields)


def data_of(made: Corpus, rank: int = 0, world: int = 1, said: list[str] | None = None) -> StreamedData:
    return StreamedData(made, {}, World(), said.append if said is not None else lambda _: None)


def rows_of(data: StreamedData, start: int, updates: int, batch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in data.rows(Positions(start, updates, batch, rank, world), 0)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return written(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("packing", ["none", "first_fit"])
@pytest.mark.parametrize("buffer", [0, 40])
def test_an_epoch_has_every_document_once(files: list[Path], packing: str, buffer: int) -> None:
    made = corpus(files, packing, buffer)
    found, orders = Counter[bytes](), list[list[int]]()
    for number in range(made.lanes):
        lane, own = Lane(made, number, Position()), list[int]()
        while (row := lane.row()).after.epoch == 0:
            ends = np.cumsum([0, *row.lengths]).tolist()
            pieces = [bytes(row.ids[a:b].astype(np.uint8)) for a, b in itertools.pairwise(ends)]
            found.update(pieces)
            own += [int(piece[1:6]) for piece in pieces]
        orders.append(own)
    assert len(found) == 300 and set(found.values()) == {1}
    assert buffer == 0 or all(own != sorted(own) for own in orders)
    assert buffer > 0 or packing != "none" or orders[0][:5] == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("buffer", [0, 40])
def test_where_a_document_is_cut_every_token_is_a_target_once(files: list[Path], buffer: int) -> None:
    made = corpus(files, "concatenate", buffer)
    texts = [b"<%05d" % k + b"x" * (k % 23) + b">" for k in range(300)]
    wanted = {text[:k] for text in texts for k in range(2, len(text) + 1)}  # each token with all that is before it
    found = set[bytes]()
    for number in range(made.lanes):
        lane, before = Lane(made, number, Position()), b""
        while lane.now.epoch == 0:
            row = lane.row()
            for piece, at in zip(row.lengths, np.cumsum([0, *row.lengths]).tolist()):
                own = bytes(row.ids[at : at + piece].astype(np.uint8))
                before = b"" if own[:1] == b"<" else before[:-1]  # a cut document goes on with the last token again
                found |= {before + own[:k] for k in range(2, piece + 1)}
                before += own
    assert found == wanted


@given(st.data())
@settings(deadline=None, max_examples=12)
def test_from_any_position_on_any_number_of_ranks_the_rows_are_those_of_an_unbroken_run(
    files: list[Path], data: st.DataObject
) -> None:
    packing = data.draw(st.sampled_from(["none", "concatenate", "first_fit"]))
    batch = data.draw(st.integers(4, 9))
    made = corpus(files, packing, data.draw(st.sampled_from([0, 40])), lanes=data.draw(st.sampled_from([1, 3, 4])))
    whole = rows_of(data_of(made), 0, 24, batch)
    at, found, kept = 0, list[list[int]](), dict[str, Any]()
    while at < 24:
        world = data.draw(st.sampled_from([1, 2, 3, 4]))
        count = min(data.draw(st.integers(1, 9)), 24 - at)
        state: Any = None if at == 0 else json.loads(json.dumps(kept))
        parts, states = [], []
        for rank in range(world):
            one = data_of(made)
            if state is not None:
                one.go_to(state)
            own = rows_of(one, at * batch, count, batch, rank, world)
            parts.append(own)
            one.note((at + count) * batch)
            states.append(one)
        merged = states[0]
        for other in states[1:]:  # what `gathered` brings together
            for lane, place in other.places.items():
                merged.places[lane] = max(place, merged.places.get(lane, place))
        merged.note((at + count) * batch)
        kept = merged.state_at((at + count) * batch)
        for update in range(count):
            per = [len(range(rank, batch, world)) for rank in range(world)]
            mine = [parts[r][update * per[r] : (update + 1) * per[r]] for r in range(world)]
            found += [mine[k % world][k // world] for k in range(batch)]
        at += count
    assert found == whole
    assert all(len(row) <= 32 for row in whole)


def test_each_rank_tokenizes_its_own_lanes_alone(files: list[Path]) -> None:
    readers = []
    for rank in range(2):
        made = corpus(files, lanes=4)
        rows_of(data_of(made), 0, 10, 4, rank, 2)
        readers.append(made.reader.read)  # type: ignore[attr-defined]
    assert readers[0] and readers[1] and not readers[0] & readers[1]


def test_the_buffer_bounds_what_is_tokenized_ahead(files: list[Path]) -> None:
    made = corpus(files, "none", buffer=40, lanes=4)
    rows_of(data_of(made), 0, 1, 4)
    assert 4 <= sum(made.reader.read.values()) <= 40  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_and_a_position_is_that_of_the_update_that_was_made(
    files: list[Path], workers: int
) -> None:
    made = corpus(files)
    whole = rows_of(data_of(made), 0, 8, 4)
    data = data_of(made)
    found, states = [], {}
    for update, parts in enumerate(streamed(data, list, Positions(0, 8, 4, 0, 1), 2, workers)):
        found += [row["input_ids"].tolist() for part in parts for row in part]
        states[update + 1] = data.state_at((update + 1) * 4)
        before = data.state_at(update * 4)  # an update that was fetched, and not made
        assert update == 0 or before == states[update]
    assert found == whole
    again = data_of(made)
    again.go_to(states[5])
    assert rows_of(again, 20, 3, 4) == whole[20:]


def test_files_that_change_are_refused_and_files_that_are_added_are_said(tmp_path: Path) -> None:
    files = written(tmp_path)
    data = data_of(corpus(files))
    want = rows_of(data, 0, 6, 4)
    data = data_of(corpus(files))
    rows_of(data, 0, 3, 4)
    data.note(12)
    state = data.state_at(12)
    (tmp_path / "9.jsonl").write_text('{"text": "something new"}\n')
    said: list[str] = []
    more = data_of(corpus([*files, tmp_path / "9.jsonl"]), said=said)
    more.go_to(state)
    assert rows_of(more, 12, 3, 4) == want[12:]
    assert "1 files that were not there when the run began are left out" in said[0]
    files[1].write_text(files[1].read_text().replace("<00001", "<99991"))
    with pytest.raises(tk.TensorkeepError) as caught:
        data_of(corpus(files)).go_to(state)
    assert caught.value.code == "R04" and str(files[1]) in str(caught.value.where)
    files[1].unlink()
    with pytest.raises(tk.TensorkeepError) as caught:
        data_of(corpus([files[0], files[2]])).go_to(state)
    assert caught.value.code == "F05"


@pytest.mark.parametrize(
    "wrong", [{}, {"files": []}, {"places": {"7": [0] * 8}}, {"places": {"0": [1, 2]}}, {"unit": 0}]
)
def test_a_position_that_makes_no_sense_is_one_error(files: list[Path], wrong: dict[str, Any]) -> None:
    data = data_of(corpus(files))
    state = data.state_at(0) | wrong if wrong else {}
    if wrong == {"files": []}:
        state["files"] = [["a"]]
    with pytest.raises(tk.TensorkeepError) as caught:
        data.go_to(state)
    assert caught.value.code == "F07"


def test_lanes_without_documents_read_those_of_others_and_a_corpus_without_any_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "long " * 400 + '"}\n{"text": "short"}\n')
    said: list[str] = []
    made = corpus([path], size=256, lanes=4, buffer=0)
    assert len(made.units) == 8
    assert len(rows_of(data_of(made, said=said), 0, 3, 4)) == 12
    assert any("hold no document" in line for line in said)
    path.write_text("\n" * 600 + '{"text": "x"}\n')
    with pytest.raises(tk.TensorkeepError, match="empty"):
        rows_of(data_of(corpus([path], size=256, lanes=2)), 0, 1, 4)


def test_every_kind_of_source_is_streamed(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"<{k:05}>" for k in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    parquet.write_table(arrow.table({"text": texts[:20]}), tmp_path / "a.parquet", row_group_size=6)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:40]).encode()))
    (tmp_path / "c.txt").write_text(texts[40])
    for k in range(41, 60):
        (tmp_path / f"{k}.txt.part").write_text(texts[k])
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for k in range(41, 60):
            tar.add(tmp_path / f"{k}.txt.part", arcname=f"{k}.txt")
            (tmp_path / f"{k}.txt.part").unlink()
    files = expanded([tmp_path])
    made = corpus(files, "none", buffer=8, lanes=2)
    assert [unit for unit in made.units if unit.file == 0] == [(0, g, g + 1) for g in range(4)]
    found = Counter[str]()
    for number in range(2):
        lane = Lane(made, number, Position())
        while lane.now.epoch == 0:
            found[bytes(lane.row().ids.astype(np.uint8)).decode()] += 1
    assert set(found) <= set(texts) and len(found) >= 58


def test_units_and_lanes_follow_the_size_of_the_corpus(tmp_path: Path) -> None:
    small = written(tmp_path, 10)
    assert divided(small, "auto")[1] == 1
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(80 << 30)  # a hole: nothing is read to divide it
    size, lanes = divided([large], "auto")
    assert (size, lanes) == (streaming.UNIT, 192)
    with large.open("r+b") as file:
        file.truncate(2 << 40)
    assert divided([large], "auto") == (32 << 20, 192)
