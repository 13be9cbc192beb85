"""Many small tensors: read in one go, written together, read back in large pieces; every digest is the tensor's own."""

from __future__ import annotations

import gc
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.conversion import writing
from tensorkeep.conversion._runs import runs
from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.conversion.sink import sink_files
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.storage import archive
from tensorkeep.storage._likeness import likeness
from tensorkeep.storage.certificate import dump
from tensorkeep.storage.run_manifest import manifest_bytes

COUNT = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    draw = torch.Generator().manual_seed(0)
    tensors = {f"blocks.{i}.w": torch.randn(3, 1 + i % 7, generator=draw) for i in range(COUNT)}
    tensors |= {f"half.{i}": torch.randn(5, generator=draw).bfloat16() for i in range(9)}
    save_file({**tensors, "none": torch.zeros(0, 4)}, folder / "model.safetensors")
    return folder


def reads_of(view: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    read_into = type(view.folder).read_into

    def spy(self: Any, name: str, start: int, buffer: memoryview) -> None:
        made.append((start, len(buffer)))
        read_into(self, name, start, buffer)

    monkeypatch.setattr(type(view.folder), "read_into", spy)
    return made


@pytest.mark.parametrize("to", ["hf", "dcp", "pth"])
def test_small_tensors_are_read_in_few_reads_and_arrive_bit_by_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    wanted = load_file(source / "model.safetensors")
    plan = make_plan([read(source)], to)
    made = reads_of(plan.sources[0], monkeypatch)
    result = convert(plan, str(tmp_path / "out"), to)
    before = len([size for _, size in made if size])
    monkeypatch.undo()
    if to == "hf":
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert before < (COUNT + 10) / 8
    elif to == "pth":
        found = torch.load(next((tmp_path / "out").glob("*.pth")), weights_only=True)
    else:
        found = {n: torch.zeros_like(t) for n, t in wanted.items()}
        dcp.load(found, checkpoint_id=tmp_path / "out", no_dist=True)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
    for name, tensor in wanted.items():
        assert result.digests[name] == xxhash.xxh3_128_hexdigest(
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )


def test_a_cast_or_a_gap_ends_a_run(source: Path) -> None:
    def found(**options: Any) -> list[int]:
        plan = make_plan([read(source)], "hf", **options)
        (layout,) = [f for f in sink_files(plan, "out", "hf", None)[0] if f.slots]
        steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
        made, alone = runs(layout.slots, steps, plan)
        assert {s.tensor for s in alone} | {s.tensor for r in made for _, s in r.slots} == {*steps}
        return [len(r.slots) for r in made] + [1] * len(alone)

    assert sorted(found()) == [1, COUNT + 9]  # an empty tensor is in no run
    assert sorted(found(dtype="BF16")) == [1] * (COUNT + 1) + [9]
    gaps = found(drop=("blocks.1?.w", "blocks.2??.w"))
    assert sum(gaps) == COUNT + 10 - 110 and len(gaps) < 6


def test_bytes_between_are_read_along_only_while_they_are_the_fewer(tmp_path: Path) -> None:
    tensors = {f"a{i:03}": torch.zeros(1000 if i % 2 else 10) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    plan = make_plan([read(tmp_path)], "hf", drop=tuple(n for i, n in enumerate(tensors) if i % 2))
    (layout,) = [f for f in sink_files(plan, "out", "hf", None)[0] if f.slots]
    made, alone = runs(layout.slots, {s.sink.name: s for s in plan.steps if s.sink is not None}, plan)
    assert [len(r.slots) for r in made] == [1] * 20 and not alone


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_byte_that_did_not_reach_the_disk_is_found_whatever_tensor_it_is_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    plan = make_plan([read(source)], to)
    layout = next(f for f in sink_files(plan, "out", to, None)[0] if f.slots)
    slots = [s for s in layout.slots if s.nbytes]
    fsync = writing.os.fsync
    for slot in (slots[0], slots[len(slots) // 2], slots[-1]):

        def flip(handle: int, at: int = slot.start + slot.nbytes - 1) -> None:
            byte = writing.os.pread(handle, 1, at)  # none where this is a smaller file
            writing.os.pwrite(handle, bytes([byte[0] ^ 1]), at) if byte else None
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(writing.os, "fsync", flip)
            with pytest.raises(TensorkeepError, match=f"read back, {slot.tensor} is not") as error:
                convert(make_plan([read(source)], to), str(tmp_path / "out"), to)
        assert error.value.code == "F03" and not (tmp_path / "out").exists()


def test_a_source_that_is_cut_while_it_is_read_is_an_error(source: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model.safetensors"
    copied.write_bytes((source / "model.safetensors").read_bytes())
    plan = make_plan([read(copied)], "hf")
    with copied.open("r+b") as file:
        file.truncate(copied.stat().st_size - 1000)
    with pytest.raises(TensorkeepError):
        convert(plan, str(tmp_path / "out"), "hf")


def test_archives_of_a_dcp_folder_are_told_by_their_likeness_and_no_other_ones(tmp_path: Path) -> None:
    archive._alike.clear()
    tensors = {f"w{i}": torch.full((4, 8), float(i)) for i in range(20)} | {
        f"v{i}": torch.arange(i + 1) for i in range(5)
    }
    dcp.save(tensors, checkpoint_id=tmp_path / "a", no_dist=True)
    view = read(tmp_path / "a")
    view.checked = True
    assert all(torch.equal(view.tensor(n), t) for n, t in tensors.items())
    assert archive._alike
    file = next((tmp_path / "a").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    block = view["w7"].blocks[0]
    place = view.spans("w7")
    assert place is not None and place[0][3] == zlib.crc32(tensors["w7"].numpy().tobytes())
    whole = bytes(data[block.start : block.start + block.nbytes])
    for what in (b"data.pkl", b"PK\x01\x02", b"PK\x05\x06"):  # none of these may be another archive's
        at = whole.rindex(what)
        file.write_bytes(data[: block.start + at] + b"XX" + data[block.start + at + 2 :])
        odd = read(tmp_path / "a")
        with pytest.raises(TensorkeepError):
            odd.tensor("w7")
        assert torch.equal(odd.tensor("w8"), tensors["w8"])
    data[place[0][1]] ^= 1
    file.write_bytes(data)
    odd = read(tmp_path / "a")
    odd.checked = True
    with pytest.raises(TensorkeepError, match="w7"):
        odd.tensor("w7")


@given(
    st.binary(max_size=40), st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4), st.integers(0, 200)
)
def test_a_likeness_is_of_equal_bytes_but_for_the_checksum(front: bytes, crc: bytes, other: bytes, at: int) -> None:
    def rest(mark: bytes) -> bytes:
        return front + mark + b"middle" + mark + b"PK\x05\x06" + b"e" * 18

    value = int.from_bytes(crc, "little")
    known = likeness(rest(crc), len(front), len(front) + 9, value)
    assert known is not None
    assert known.crc_of(rest(crc)) == value
    if front.find(crc) < 0 and value and rest(crc).count(crc) == 2:
        assert known.crc_of(rest(other)) == int.from_bytes(other, "little")
    changed = bytearray(rest(crc))
    changed[at % len(changed)] ^= 1
    assert known.crc_of(bytes(changed)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.text(), JSON))
def test_certificates_and_manifests_are_spelled_as_json_spells_them(document: dict[str, Any]) -> None:
    wanted = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    assert dump(document) == wanted
    body = {name: value for name, value in document.items() if name != "xxh3_128"}
    digest = xxhash.xxh3_128((json.dumps(body, indent=1) + "\n").encode()).hexdigest()
    assert manifest_bytes(document) == (json.dumps({**body, "xxh3_128": digest}, indent=1) + "\n").encode()


def test_commands_over_files_look_for_garbage_less_often_and_leave_python_as_it_was(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = gc.get_threshold(), list[int]()
    monkeypatch.setattr("tensorkeep.cli.run", lambda *_: during.append(gc.get_threshold()[0]) or 0)
    assert main(["convert"]) == main(["train", "language"]) == main([]) == 0
    assert during == [50_000, before[0], before[0]] and gc.get_threshold() == before


def test_numbers_of_numpy_are_no_json() -> None:
    with pytest.raises(TypeError):
        dump({"a": np.float32(1)})
