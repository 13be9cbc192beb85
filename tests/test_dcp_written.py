"""`--to dcp --ranks N`: the folder that N ranks under FSDP2 write, chunk by chunk, and torch's own loader reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.formats.dcp import chunks_of
from tensorkeep.training.distributed import World
from tests.training import ranks

SHAPES = [(5, 3), (3,), (1,), (7, 2), (8, 2), (2, 3, 4), (9,), (300, 20)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Module()
    for number, shape in enumerate(SHAPES):
        made.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape)))
    return made.to(torch.bfloat16)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in safetensors; as four ranks of torch saved it; as we wrote it for four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    save_file(dict(model().state_dict()), folder / "model.safetensors")

    def work(world: World) -> None:
        sharded = model()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (world.size,)))
        dcp.save({"model": sharded.state_dict()}, checkpoint_id=folder / "torch")

    assert ranks(4, work) == [0] * 4
    command = ["convert", folder / "model.safetensors", folder / "ours", "--to", "dcp", "--root", "model", "--ranks", 4]
    assert main([str(word) for word in command]) == 0
    return folder


def chunks(folder: Path) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...], str]]]:
    """For each tensor its chunks in order, as torch reads them: offset, size, file (an empty one's may be any)."""
    metadata = FileSystemReader(folder).read_metadata()
    places = {(i.fqn, tuple(i.offset or ())): info.relative_path for i, info in metadata.storage_data.items()}
    return {
        name: [
            (tuple(c.offsets), tuple(c.sizes), places[name, tuple(c.offsets)] if c.sizes.numel() else "")
            for c in entry.chunks
        ]
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def test_the_chunks_are_those_of_torch(place: Path) -> None:
    theirs, ours = chunks(place / "torch"), chunks(place / "ours")
    assert ours == theirs and len(ours) == len(SHAPES)
    files = {p.name for p in (place / "ours").glob("*.distcp")}
    assert files == {p.name for p in (place / "torch").glob("*.distcp")} == {f"__{r}_0.distcp" for r in range(4)}
    one, other = (FileSystemReader(place / name).read_metadata() for name in ("torch", "ours"))
    assert one.planner_data == other.planner_data
    assert {n: (e.size, e.properties.dtype) for n, e in one.state_dict_metadata.items()} == {
        n: (e.size, e.properties.dtype) for n, e in other.state_dict_metadata.items()
    }


@pytest.mark.parametrize("size", [1, 2])
def test_torchs_own_loader_fills_any_number_of_ranks(place: Path, size: int) -> None:
    def work(world: World) -> None:
        empty, want = model(), model().state_dict()
        with torch.no_grad():
            for parameter in empty.parameters():
                parameter.zero_()
        if world.size > 1:
            fully_shard(empty, mesh=init_device_mesh("cpu", (world.size,)))
        dcp.load({"model": empty.state_dict()}, checkpoint_id=place / "ours")
        for name, tensor in empty.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, want[name]), name

    assert ranks(size, work) == [0] * size


def test_our_commands_read_it_and_find_a_flipped_bit(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["diff", str(place / "model.safetensors"), str(place / "ours")]) == 0
    assert main(["verify", str(place / "ours")]) == 0
    path = place / "ours" / "__2_0.distcp"
    data = bytearray(path.read_bytes())
    record = tk.read(place / "ours")["model.p7"]
    block = next(b for b in record.blocks if b.file == path.name)
    data[block.start + block.nbytes // 2] ^= 1
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        capsys.readouterr()
        assert main(["verify", str(place / "ours"), "--json"]) == 1
        (found,) = json.loads(capsys.readouterr().out)["findings"]
        assert (found["code"], found["tensors"]) == ("F03", ["model.p7"])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "hf", "--ranks", "2"],
        ["--to", "dcp", "--ranks", "0"],
        ["--to", "dcp", "--ranks", "2", "--shard-size", "1MB"],
    ],
)
def test_what_makes_no_sense_is_refused(place: Path, tmp_path: Path, words: list[str]) -> None:
    assert main(["convert", str(place / "model.safetensors"), str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out").exists()


def test_a_store_takes_none(place: Path) -> None:
    plan = tk.make_plan([tk.read(place / "model.safetensors")], "dcp")
    plan.ranks = 2
    with pytest.raises(tk.TensorkeepError, match="store"):
        tk.convert(plan, "memory://some/where", "dcp")


def test_scalars_and_rows_fewer_than_ranks(tmp_path: Path) -> None:
    tensors = {"s": torch.tensor(4.0), "e": torch.zeros(0, 3), "w": torch.arange(10).reshape(2, 5)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--to", "dcp", "--ranks", "3"]) == 0
    empty = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    dcp.load(empty, checkpoint_id=tmp_path / "out")
    assert all(torch.equal(empty[name], tensor) for name, tensor in tensors.items())
    view = tk.read(tmp_path / "out")
    assert all(torch.equal(view.tensor(name), tensor) for name, tensor in tensors.items())
    assert [n for _, n in chunks_of((2, 5), 3)] == [(1, 5), (1, 5), (0, 5)]
