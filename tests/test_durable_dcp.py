"""DurableWriter and DurableReader: torch reads what they write, every flipped bit has a name, half a save is none."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.storage import manifest_entries
from tensorkeep.training import _shard_files
from tensorkeep.training._dcp_metadata import unpickled
from tensorkeep.training.distributed import World
from tests.training import ranks, shards_of

warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def network(width: int = 10) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 3).to(torch.float64))


def trained(size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model under FSDP2 after an update; layers are cut unevenly, and some ranks hold nothing of some tensors."""
    model = network()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    out = model[1](model[0](torch.ones(2, 6)))
    model[2](out.double()).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
        "step": 7,
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "across": torch.arange(12.0).reshape(3, 4).t(),
    }


def save(path: Path, size: int) -> None:
    def work(world: World) -> None:
        dcp.save(state_of(*trained(size)), storage_writer=tk.DurableWriter(path))

    assert ranks(size, work) == [0] * size


@pytest.fixture(scope="module", params=[1, 3])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dcp") / "one"
    save(path, request.param)
    return path


def whole(path: Path, out: Path) -> dict[str, Any]:
    dcp_to_torch_save(path, out)
    return dict(torch.load(out, weights_only=True))


def test_plain_torch_reads_the_folder(saved: Path, tmp_path: Path) -> None:
    model, optimizer = trained(1)
    wanted, found = state_of(model, optimizer), whole(saved, tmp_path / "all.pt")
    assert found["step"] == 7 and found["empty"].shape == (0, 4)
    for name in ("scalar", "across"):
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-6, atol=1e-7)
    plain = {"model": {n: torch.zeros_like(t) for n, t in wanted["model"].items()}, "step": 0}
    dcp.load(plain, storage_reader=dcp.FileSystemReader(saved))
    assert plain["step"] == 7 and all(torch.equal(plain["model"][n], t) for n, t in found["model"].items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_reads_it_back(saved: Path, tmp_path: Path, size: int) -> None:
    wanted = whole(saved, tmp_path / "all.pt")

    def work(world: World) -> None:
        model, optimizer = trained(size)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        state = state_of(model, optimizer) | {"step": 0, "across": torch.zeros(4, 3), "scalar": torch.zeros(())}
        state["scalar"] = state["scalar"].bfloat16()
        dcp.load(state, storage_reader=tk.DurableReader(saved))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(full, wanted["model"][name]), name
        assert state["step"] == 7 and torch.equal(state["across"], wanted["across"])

    assert ranks(size, work) == [0] * size


def flipped(path: Path, file: str, at: int) -> None:
    with (path / file).open("r+b") as data:
        data.seek(at)
        byte = data.read(1)[0]
        data.seek(at)
        data.write(bytes([byte ^ (1 << random.randrange(8))]))


def test_a_flipped_bit_anywhere_is_found_and_its_tensor_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(3)
    shards = [(file, shard) for file, own in shards_of(saved).items() for shard in own]
    assert len({shard.tensor for _, shard in shards}) > 15
    for number, (file, shard) in enumerate(random.sample(shards, 12)):
        copy = shutil.copytree(saved, tmp_path / str(number))
        start, length = shard.archive
        data = range(shard.start, shard.start + shard.nbytes)
        at = random.choice(data) if len(data) and number % 2 else random.choice(range(start, start + length))
        flipped(copy, file, at)
        assert main(["verify", str(copy)]) == 1
        out = capsys.readouterr()
        assert "F03" in out.out + out.err and shard.tensor in out.out + out.err
        if at in data and shard.offset is not None:
            described = dcp.FileSystemReader(saved).read_metadata().state_dict_metadata[shard.tensor]
            state = {shard.tensor: torch.empty(described.size, dtype=described.properties.dtype)}
            with pytest.raises(CheckpointException, match=f"damaged since it was written: {shard.tensor}"):
                dcp.load(state, storage_reader=tk.DurableReader(copy))
    for file in (".metadata", "manifest.json"):
        copy = shutil.copytree(saved, tmp_path / file.strip("."))
        flipped(copy, file, 40)
        assert main(["verify", str(copy)]) == 1
        with pytest.raises(CheckpointException, match=r"damaged|changed"):
            dcp.load({"step": 0}, storage_reader=tk.DurableReader(copy))
    copy = shutil.copytree(saved, tmp_path / "list")
    flipped(copy, "__0_0.shards.json", 40)
    findings, _, _ = tk.verify(copy)
    assert [f.code for f in findings] == ["F03"] and "__0_0.shards.json" in findings[0].message
    assert main(["verify", str(saved)]) == 0


def test_metadata_that_names_a_function_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    with pytest.raises(tk.TensorkeepError) as caught:
        unpickled(data, tmp_path)
    assert caught.value.code == "F04" and not marker.exists()


def test_damaged_metadata_is_read_or_refused_and_never_a_traceback(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4, 2)}, storage_writer=tk.DurableWriter(tmp_path / "one"))
    whole, draw, refused = (tmp_path / "one" / ".metadata").read_bytes(), random.Random(0), 0
    nameless = whole.replace(b"state_dict_metadata", b"state_dict_metadatu")
    for data in (nameless, *(_damaged(whole, draw) for _ in range(1500))):
        try:
            unpickled(data, tmp_path)
        except tk.TensorkeepError as error:
            refused += error.code in ("F04", "F07")
    assert nameless != whole and refused > 1000


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to four of them changed, taken out or put in."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(out))
        out[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(out)


def test_chunks_that_make_no_whole_are_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(12.0).reshape(6, 2)}, storage_writer=tk.DurableWriter(tmp_path / "one"))
    for sizes in ([(0, 3)], [(0, 3), (2, 3)], [(0, 7)]):
        metadata = unpickled((tmp_path / "one" / ".metadata").read_bytes(), tmp_path)
        chunks = [ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((rows, 2))) for at, rows in sizes]
        metadata.state_dict_metadata["w"].chunks = chunks
        with pytest.raises(tk.TensorkeepError, match="make no whole") as caught:
            unpickled(pickle.dumps(metadata), tmp_path)
        assert caught.value.code == "F07" and caught.value.tensors == ("w",)


def test_larger_ranks_read_their_own_pieces_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_entries, "SMALLEST_PIECE", 1 << 10)
    weight = torch.randn(96, 64)
    dcp.save({"w": weight}, storage_writer=tk.DurableWriter(tmp_path / "one"))
    read = 0
    for rank in range(4):
        part = torch.empty(24, 64)
        reader = tk.DurableReader(tmp_path / "one")
        reader.read_metadata()
        at = torch.Size((24 * rank, 0))
        index = MetadataIndex("w", torch.Size((0, 0)))
        item = ReadItem(LoadItemType.TENSOR, index, torch.Size((0, 0)), index, at, part.shape)

        class Into:
            def resolve_tensor(self, _: Any, part: torch.Tensor = part) -> torch.Tensor:
                return part

            def commit_tensor(self, *_: Any) -> None: ...

        reader.read_data(LoadPlan([item]), Into())  # type: ignore[arg-type]
        assert torch.equal(part, weight[24 * rank :][:24])
        read += reader.bytes_read
    assert read == weight.nbytes


def test_what_is_no_checkpoint_is_not_replaced_and_a_checkpoint_is(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointException, match=r"mine\.txt"):
        dcp.save({"w": torch.ones(2)}, storage_writer=tk.DurableWriter(tmp_path / "notes"))
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    for value in (1.0, 2.0):
        writer = tk.DurableWriter(tmp_path / "one")
        future = dcp.async_save({"w": torch.full((3,), value)}, storage_writer=writer, no_dist=True)
        future.result()
    state = {"w": torch.zeros(3)}
    dcp.load(state, storage_reader=tk.DurableReader(tmp_path / "one"))
    assert state["w"].tolist() == [2.0] * 3 and sorted(p.name for p in tmp_path.iterdir()) == ["notes", "one"]


def test_a_save_that_dies_in_the_middle_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "one"
    save(path, 2)
    before = whole(path, tmp_path / "before.pt")

    def work(world: World) -> None:
        real, calls = os.pwrite, 0

        def dying(*args: Any) -> int:
            nonlocal calls
            calls += 1
            if world.rank == 1 and calls == 1:
                os._exit(9)
            return real(*args)

        os.pwrite = dying
        state = {"w": torch.ones(8), "v": torch.ones(8)}
        dcp.save(state, storage_writer=tk.DurableWriter(path, timeout=20.0))

    assert ranks(2, work, seconds=30.0)[1] == 9
    after = whole(path, tmp_path / "after.pt")
    assert after.keys() == before.keys() and all(torch.equal(before["model"][n], t) for n, t in after["model"].items())
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".one")]
    dcp.save({"w": torch.ones(2)}, storage_writer=tk.DurableWriter(path))
    assert len(left) <= 1 and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_rank_that_does_not_finish_in_time_is_named_and_no_collective_waits(tmp_path: Path) -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            real = _shard_files.durable.write_file
            _shard_files.durable.write_file = lambda *a: (time.sleep(2.0), real(*a))[1]
        state = {"w": torch.ones(8), "v": torch.zeros(8)}
        with pytest.raises(CheckpointException, match=r"rank 1 on .* did not finish writing within 1 seconds"):
            dcp.save(state, storage_writer=tk.DurableWriter(tmp_path / "one", timeout=1.0))
        dist.barrier()

    assert ranks(2, work) == [0, 0]
    assert list(tmp_path.iterdir()) == []
