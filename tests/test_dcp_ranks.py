"""DCP metadata that many ranks wrote: read by matches, with the result of reading it opcode by opcode."""

from __future__ import annotations

import io
import pickle
import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tensorkeep import TensorkeepError
from tensorkeep.formats import dcp
from tensorkeep.formats._dcp_places import RECORDS
from tensorkeep.storage.files import LocalFolder
from tensorkeep.storage.pickle_records import Record, Sizes
from tensorkeep.storage.pickle_values import Object
from tensorkeep.storage.pickles import parse

SHAPES = {"a.weight": (64, 8), "b.bias": (600_000,), "ü.weight": (64, 2, 2), f"{'n' * 300}": (64,), "c": (64, 1, 1, 3)}


def written(ranks: int, shapes: dict[str, tuple[int, ...]] | None = None, gathered: bool = True) -> Metadata:
    """The metadata as rank 0 has it: each rank's part came to it through a pickle of its own, or nothing did."""
    shapes = shapes or SHAPES
    tensors: dict[str, TensorStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for rank in range(ranks):
        chunks, places, at = {}, {}, 0
        for name, shape in shapes.items():
            rows = shape[0] // ranks
            corner, size = torch.Size((rank * rows, *[0] * (len(shape) - 1))), torch.Size((rows, *shape[1:]))
            chunks[name] = ChunkStorageMetadata(offsets=corner, sizes=size)
            places[MetadataIndex(name, corner, rank)] = _StorageInfo(f"__{rank}_0.distcp", at, size.numel() * 4)
            at += size.numel() * 4
        if gathered:
            chunks, places = pickle.loads(pickle.dumps(chunks)), pickle.loads(pickle.dumps(places))
        for name, chunk in chunks.items():
            new = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shapes[name]), [])
            tensors.setdefault(name, new).chunks.append(chunk)
        stored |= places
    return Metadata(tensors, planner_data={n: (n,) for n in shapes}, storage_data=stored)


def plain(value: object) -> object:
    """What a reader makes of a pickle, with records as the objects that they stand for."""
    if isinstance(value, Record):
        kind = value[0].name
        names = next(fields for name, fields in RECORDS.items() if name.endswith(kind))
        return kind, {n: plain(v) for n, v in zip(names, value[1:])}
    if isinstance(value, Object) and value.call.name == "Size":
        return tuple(value.args[0])
    if isinstance(value, Object):
        fields = next((fields for name, fields in RECORDS.items() if name.endswith(value.call.name)), None)
        state = value.state
        if fields is not None:
            return value.call.name, {n: plain(state.get(n)) for n in fields}
        return value.call.name, plain(value.args), plain(state)
    if isinstance(value, Sizes):
        return tuple(value)
    if isinstance(value, dict):
        return [(plain(k), plain(v)) for k, v in value.items()]
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def read(data: bytes, fast: bool) -> object:
    return parse(data, dcp.DCP_GLOBALS, "test", opaque=set(), records=RECORDS if fast else None)[0]


def records_of(value: object) -> int:
    assert isinstance(value, Object)
    return sum(isinstance(key, Record) for key in value.state["storage_data"])


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "of one process"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_matches_give_what_the_opcodes_say(protocol: int, gathered: bool) -> None:
    data = pickle.dumps(written(32, gathered=gathered), protocol)
    fast, slow = read(data, True), read(data, False)
    assert plain(fast) == plain(slow)
    # protocol 2 numbers the memo itself, and is read opcode by opcode; of 160 chunks 64 have odd names
    assert records_of(fast) == 0 if protocol == 2 else records_of(fast) >= 90


def test_what_pythons_own_pickler_spells_otherwise_is_read_too() -> None:
    stream = io.BytesIO()
    pickle._Pickler(stream, 4).dump(written(8))  # type: ignore[attr-defined]  # frames at other places
    assert plain(read(stream.getvalue(), True)) == plain(read(stream.getvalue(), False))


def test_a_part_of_a_record_that_is_asked_for_later_is_found() -> None:
    metadata = written(8)
    shared = metadata.state_dict_metadata["c"].chunks[-1]
    again = [shared.sizes, shared.offsets, *(i.fqn for i in metadata.storage_data), shared, shared.__dict__]
    for extra in (again[:-2], again):  # the object itself is not kept: all is then read opcode by opcode
        metadata.planner_data = {"c": extra}
        data = pickle.dumps(metadata, 4)
        fast = read(data, True)
        assert plain(fast) == plain(read(data, False))
        assert bool(records_of(fast)) == (extra is not again)


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_pickle_ends_alike_either_way(seed: int) -> None:
    whole, chance = pickle.dumps(written(8), 4), random.Random(seed)
    differing = 0
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data) // 2, len(data))] = chance.choice(
                [0x94, 0x68, 0x6A, 0x4B, *range(0, 256, 7)]
            )
        ends = []
        for fast in (True, False):
            try:
                ends.append(repr(plain(read(bytes(data), fast))))
            except TensorkeepError as error:
                ends.append(error.code)
            except (StopIteration, AttributeError, TypeError, IndexError):
                ends.append("no metadata")  # of this test's `plain`: the value is of other classes
        differing += ends[0] != ends[1]
    assert not differing


def test_many_ranks_cost_less_memory_than_one_object_a_field(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.w": (512, 4) for i in range(8)}
    metadata = written(512, shapes)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, 4))
    for rank in range(512):
        (tmp_path / f"__{rank}_0.distcp").write_bytes(bytes(8 * 16))
    dcp.read(LocalFolder(tmp_path), [".metadata"], str(tmp_path))
    tracemalloc.start()
    view = dcp.read(LocalFolder(tmp_path), [".metadata"], str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    chunks = sum(len(record.blocks) for record in view.values())
    found = {(n, b.offsets): (b.file, b.start, b.nbytes, b.shape) for n, r in view.items() for b in r.blocks}
    sizes = {n: tuple(t.chunks[0].sizes) for n, t in metadata.state_dict_metadata.items()}
    assert chunks == 4096
    assert found == {
        (i.fqn, tuple(i.offset)): (p.relative_path, p.offset, p.length, sizes[i.fqn])
        for i, p in metadata.storage_data.items()
    }
    assert peak < 1000 * chunks
