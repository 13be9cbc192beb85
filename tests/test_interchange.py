"""Files that go between torch and us: DCP and torch.save in all their shapes, each read by the other."""

from __future__ import annotations

import collections
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tensorkeep.formats.view import read
from tests import forked
from tests.helpers import assert_same, held, refused, to, write_hf
from tests.test_planning import odd_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHARDED = """
    import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    values = {"rows": (8, 6), "uneven": (5, 3), "one_row": (1, 4), "columns": (4, 8)}
    values |= {"uneven_columns": (3, 5), "deep": (2, 3, 7), "whole": (3, 3)}
    places = {"columns": Shard(1), "uneven_columns": Shard(1), "deep": Shard(2), "whole": Replicate()}
    counted = {n: torch.arange(torch.Size(s).numel()).reshape(s) for n, s in values.items()}
    full = {n: t.to(torch.bfloat16) + i for i, (n, t) in enumerate(counted.items())}
    state = {n: distribute_tensor(t, mesh, [places.get(n, Shard(0))]) for n, t in full.items()}
    state |= {"plain": torch.full((2, 2), 7.0), "step": torch.tensor(4)}
    dcp.save({"model": state, "train": {"step": 4}}, checkpoint_id=f"{folder}/dcp")
    dist.destroy_process_group()
    os._exit(0)  # what was saved is whole; gloo's threads abort some exits on a loaded machine
"""


def load(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    """What torch's own `dcp.load` puts into an empty state dict of these shapes."""
    state = {n: load_like(t) for n, t in like.items()}
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def load_like(value: Any) -> Any:
    return {n: load_like(t) for n, t in value.items()} if isinstance(value, dict) else torch.zeros_like(value)


@pytest.mark.parametrize("root", [None, "model"])
def test_torch_loads_our_dcp_of_every_dtype(tmp_path: Path, root: str | None) -> None:
    tensors = odd_tensors()
    to(write_hf(tmp_path / "hf", tensors), tmp_path / "dcp", "dcp", root=root)
    state = load(tmp_path / "dcp", {root: tensors} if root else tensors)
    assert_same(state[root] if root else state, tensors)


def test_torch_resumes_from_several_files_of_ours(tmp_path: Path) -> None:
    from tensorkeep.conversion.execution import convert
    from tensorkeep.conversion.planning import make_plan

    tensors = {f"layers.{n}.w": torch.randn(8, 8) for n in range(12)}
    convert(make_plan([read(write_hf(tmp_path / "hf", tensors))], "dcp"), str(tmp_path / "dcp"), "dcp", shard_size=600)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 6
    assert_same(load(tmp_path / "dcp", tensors), tensors)


@pytest.mark.parametrize("threads", [1, 3])
def test_we_read_what_torch_saves_as_dcp(tmp_path: Path, threads: int) -> None:
    tensors = odd_tensors()
    tensors["complex128"] = torch.randn(3, 2, dtype=torch.complex128)
    state = {"model": tensors, "optimizer": {"lr": 0.1, "groups": [1, 2]}, "step": 7}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp", thread_count=threads), no_dist=True)
    view = read(tmp_path / "dcp")
    assert_same({n.removeprefix("model."): view.tensor(n) for n in view}, tensors)
    assert "step" in view.entries and not any(n.startswith("optimizer") for n in view)


def test_we_read_what_two_ranks_save(tmp_path: Path) -> None:
    script = tmp_path / "write.py"
    script.write_text(textwrap.dedent(SHARDED))
    ranks = [
        forked.Popen([sys.executable, "-W", "ignore", script, str(r), tmp_path], stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-2000:]
    view = read(tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2 and len(view["model.columns"].blocks) == 2
    like = {n.removeprefix("model."): torch.zeros(r.shape, dtype=view.tensor(n).dtype) for n, r in view.items()}
    theirs = load(tmp_path / "dcp", {"model": like})["model"]
    assert_same({n: view.tensor(f"model.{n}") for n in like}, theirs)
    assert torch.equal(theirs["uneven_columns"].flatten().float(), torch.arange(15.0) + 4)
    to(tmp_path / "dcp", tmp_path / "out.pth", "pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), theirs)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_we_read_what_torch_saves_as_pth(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    shared = torch.randn(4, 2)
    state = collections.OrderedDict(
        {
            "view": base[1:4, 2:9],
            "turned": base.t(),
            "expanded": torch.ones(1, 3).expand(4, 3),
            "one": torch.tensor(3.5),
            "none": torch.empty(0, 4),
            "tied": shared,
            "tied_too": shared,
            "grad": torch.nn.Parameter(torch.randn(3)),
            **{str(d): base.to(d) for d in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64)},
        }
    )
    if zipped:
        state |= {str(d): base.to(d) for d in (torch.float8_e4m3fn, torch.float8_e5m2)}
        state["wide"] = torch.tensor([1, 2**63 - 1]).to(torch.uint64)
    module = Tiny().state_dict()
    torch.save({"a": state, "m": module, "epoch": 3}, tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    view = read(tmp_path / "in.pth")
    wanted = {f"a.{n}": t for n, t in state.items()} | {f"m.{n}": t for n, t in module.items()}
    assert_same({n: view.tensor(n) for n in view}, {n: t.detach() for n, t in wanted.items()})
    assert view["a.tied_too"].tied_to == "a.tied" and view["m.head.weight"].tied_to == "m.embed.weight"
    assert view.entries["epoch"] == 3


@pytest.mark.parametrize("root", [None, "state_dict"])
def test_torch_maps_our_pth(tmp_path: Path, root: str | None) -> None:
    tensors = odd_tensors()
    to(write_hf(tmp_path / "hf", tensors), tmp_path / "out.pth", "pth", root=root)
    for options in ({"mmap": True}, {"mmap": False}):
        made = torch.load(tmp_path / "out.pth", weights_only=True, **options)
        assert_same(made[root] if root else made, tensors)
    torch.load(io.BytesIO((tmp_path / "out.pth").read_bytes()), weights_only=True)


def test_transformers_style_shards_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = odd_tensors()
    to(write_hf(tmp_path / "hf", tensors), tmp_path / "out", "hf")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    assert_same(held(tmp_path / "out"), tensors)


def test_complex128_goes_where_it_can_be_read(tmp_path: Path) -> None:
    tensors = {"a.w": torch.randn(3, 2, dtype=torch.complex128), "b.w": torch.randn(2)}
    torch.save(tensors, tmp_path / "in.pth")
    to(tmp_path / "in.pth", tmp_path / "dcp", "dcp")
    assert_same(load(tmp_path / "dcp", tensors), tensors)
    to(tmp_path / "dcp", tmp_path / "out.pth", "pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True, mmap=True), tensors)
    with refused(None, "complex128", "a.w"):
        to(tmp_path / "in.pth", tmp_path / "hf", "hf")
