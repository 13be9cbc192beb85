"""Layouts: files without gaps or overlaps, zips that zipfile and torch accept, also beyond 4 GiB."""

from __future__ import annotations

import struct
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import load as dcp_load

from tensorkeep.formats import dcp, pth, safetensors
from tensorkeep.storage.archive import saved_value, zip_entries
from tensorkeep.storage.archive_writing import build_archive, tensor_object
from tensorkeep.storage.layout import FileLayout, Fixed, SinkTensor, Slot, Trailer, shards
from tensorkeep.storage.pickle_values import Global, Object
from tensorkeep.storage.record import FROM_TORCH
from tensorkeep.storage.state_dicts import iter_tensors
from tests.samples import run, state, write_hf

dtypes = st.sampled_from(sorted(FROM_TORCH.values()))
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensor_lists = st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=8).map(
    lambda found: [SinkTensor(f"layers.{i}.w", d, s) for i, (d, s) in enumerate(found)]
)
FORMATS: dict[str, Any] = {"hf": safetensors, "dcp": dcp, "pth": pth}


def fill(layout: FileLayout, data: dict[str, bytes]) -> bytes:
    """The file a layout describes, checked on the way: each segment begins where the one before ended."""
    out = bytearray()
    crcs = {name: zlib.crc32(raw) for name, raw in data.items()}
    for segment in layout.segments:
        assert segment.start == len(out)
        if isinstance(segment, Fixed):
            out += segment.data
        elif isinstance(segment, Slot):
            assert segment.nbytes == len(data[segment.tensor])
            out += data[segment.tensor]
        else:
            made = segment.make(crcs)
            assert len(made) == segment.size
            out += made
    assert layout.size == len(out)
    return bytes(out)


def raw(tensors: list[SinkTensor]) -> dict[str, bytes]:
    return {t.name: bytes((i * 7 + at) % 2 for at in range(t.nbytes)) for i, t in enumerate(tensors)}


@given(tensor_lists, st.sampled_from(sorted(FORMATS)), st.integers(1, 200), st.sampled_from([None, "model"]))
def test_every_format_lays_out_files_without_gaps_and_each_tensor_once(
    tensors: list[SinkTensor], to: str, shard_size: int, root: str | None
) -> None:
    if to == "hf":
        tensors = [t for t in tensors if t.dtype != "C128"]  # which safetensors lacks
    layouts = FORMATS[to].layout(tensors, shard_size=shard_size, root=root)
    for layout in layouts:
        fill(layout, raw(tensors))
    assert sorted(s.tensor for f in layouts for s in f.slots) == sorted(t.name for t in tensors)
    assert len({f.name for f in layouts}) == len(layouts)


@given(tensor_lists, st.integers(1, 200))
def test_shards_hold_every_tensor_in_order_and_only_a_lone_tensor_may_be_larger(
    tensors: list[SinkTensor], size: int
) -> None:
    made = shards(tensors, size)
    assert [t for part in made for t in part] == tensors
    assert all(sum(t.nbytes for t in part) <= size or len(part) == 1 for part in made)
    # a shard is closed only when the next tensor does not fit
    assert all(sum(t.nbytes for t in a) + b[0].nbytes > size for a, b in pairwise(made))


@given(tensor_lists)
def test_archives_are_zips_that_zipfile_finds_sound_and_torch_loads(tensors: list[SinkTensor]) -> None:
    import io

    data = raw(tensors)
    (layout,) = pth.layout(tensors)
    made = fill(layout, data)
    with zipfile.ZipFile(io.BytesIO(made)) as archive:
        assert archive.testzip() is None
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
    loaded = torch.load(io.BytesIO(made), weights_only=True)
    for tensor in tensors:
        got = loaded[tensor.name]
        assert (FROM_TORCH[str(got.dtype).removeprefix("torch.")], tuple(got.shape)) == (tensor.dtype, tensor.shape)
        assert got.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data[tensor.name]


@given(tensor_lists)
def test_tensor_data_in_archives_is_aligned_for_those_who_map_the_file(tensors: list[SinkTensor]) -> None:
    (layout,) = pth.layout(tensors)
    assert all(slot.start % 64 == 0 for slot in layout.slots)


def test_tied_tensors_share_a_storage_and_torch_finds_them_shared(tmp_path: Path) -> None:
    import io

    one, two = SinkTensor("a", "F32", (2, 2)), SinkTensor("b", "F32", (2, 2), tied_to="a")
    (layout,) = pth.layout([one, two], root="model")
    assert [slot.tensor for slot in layout.slots] == ["a"]
    loaded = torch.load(io.BytesIO(fill(layout, {"a": b"\0" * 16})), weights_only=True)["model"]
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


@pytest.mark.parametrize("to, name", [("hf", "out"), ("dcp", "out"), ("pth", "m.pth")])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_and_safetensors_load_what_is_written(tmp_path: Path, to: str, name: str) -> None:
    from safetensors.torch import load_file

    run(write_hf(tmp_path / "source"), tmp_path / name, to)
    if to == "hf":
        loaded = load_file(tmp_path / name / "model.safetensors")
    elif to == "pth":
        loaded = torch.load(tmp_path / name, weights_only=True, mmap=True)
    else:
        loaded = {n: torch.full_like(t, 1) for n, t in state().items()}
        dcp_load(loaded, checkpoint_id=tmp_path / name, no_dist=True)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in state().items())


# -- beyond 4 GiB ---------------------------------------------------------------------------------------------------


class Sparse:
    """A file whose tensor data is zero and never stored: a folder for `archive.zip_entries`, a stream for zipfile."""

    url = "sparse"

    def __init__(self, layout: FileLayout, crcs: dict[str, int]) -> None:
        self.length = layout.size
        self.pieces: list[tuple[int, bytes]] = []
        for segment in layout.segments:
            if isinstance(segment, (Fixed, Trailer)):
                self.pieces.append((segment.start, segment.data if isinstance(segment, Fixed) else segment.make(crcs)))

    def size(self, name: str) -> int:
        return self.length

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        stop = self.length if length is None else start + length
        assert stop - start < 1 << 20, "reads what it need not"
        out = bytearray(stop - start)
        for at, data in self.pieces:
            low, high = max(at, start), min(at + len(data), stop)
            if low < high:
                out[low - start : high - start] = data[low - at : high - at]
        return bytes(out)


SIZES = [(5 << 30,), (100, 5 << 30, 200), (1 << 30,) * 5 + (7,), (0xFFFFFFFF,), (0xFFFFFFFE,), (20 << 20,) * 300]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}x{max(sizes)}")
def test_archives_beyond_4_gib_are_zip64_that_reads_back(sizes: tuple[int, ...], tmp_path: Path) -> None:
    tensors = [SinkTensor(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    (layout,) = pth.layout(tensors)
    crcs = {t.name: 0x12345678 + i for i, t in enumerate(tensors)}
    file = Sparse(layout, crcs)
    found = zip_entries(file, "m.pth", 0, file.length)  # type: ignore[arg-type]
    assert [found[f"data/{i}"][1:] for i in range(len(sizes))] == [(t.nbytes, crcs[t.name]) for t in tensors]
    assert [found[f"data/{s.tensor[1:]}"].start for s in layout.slots] == [s.start for s in layout.slots]
    value = saved_value(file, "m.pth", found)  # type: ignore[arg-type]
    assert [stored.shape for _, stored in iter_tensors(value, "m.pth")] == [t.shape for t in tensors]

    path = tmp_path / "sparse.pth"
    with path.open("wb") as out:
        for at, data in file.pieces:
            out.seek(at)
            out.write(data)
        out.truncate(file.length)
    with zipfile.ZipFile(path) as archive:
        assert [i.file_size for i in archive.infolist() if "/data/" in i.filename] == list(sizes)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert [t.numel() for t in mapped.values()] == list(sizes)
    descriptors = [s for s in layout.segments if isinstance(s, Trailer)][:-1]
    for tensor, trailer in zip(tensors, descriptors):
        form = "<IIQQ" if tensor.nbytes >= 0xFFFFFFFF else "<IIII"
        assert struct.unpack(form, trailer.make(crcs)) == (0x08074B50, crcs[tensor.name], tensor.nbytes, tensor.nbytes)


def test_an_archive_of_more_than_65535_entries_counts_them_in_zip64() -> None:
    tensors = [SinkTensor(f"t{i}", "U8", (1,)) for i in range(70_000)]
    made = build_archive(0, Object(Global("collections", "OrderedDict")), [(str(i), t) for i, t in enumerate(tensors)])
    file = Sparse(FileLayout("m.pth", made.segments), {t.name: 0 for t in tensors})
    end = made.at
    tail = file.read("m.pth", end - 98, 98)
    assert tail[:4] == b"PK\x06\x06" and struct.unpack("<Q", tail[32:40]) == (70_003,)
    assert struct.unpack("<Q", tail[76 - 12 : 76 - 4])[0] == end - 98 and tail[-22:-18] == b"PK\x05\x06"


@given(tensor_lists)
def test_a_tensor_entry_reads_back_as_what_it_was_written_for(tensors: list[SinkTensor]) -> None:
    from tensorkeep.storage.archive import stored_tensor

    for tensor in tensors:
        stored = stored_tensor(tensor_object(tensor, "0"), "test")
        assert stored is not None and (stored.dtype, stored.shape, stored.offset) == (tensor.dtype, tensor.shape, 0)
