"""A whole checkpoint resumed in shards: the ranks read every byte of it once between them, and compare it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

import tensorkeep as tk
from tensorkeep.storage import durable
from tensorkeep.training import _whole_load as whole
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.live_state import optimizer_state, stored_tensors
from tensorkeep.training.loop import fit
from tests.training import Net, ranks, small_job

LOOP = Loop(updates=4, batch=5, micro=1, save_every=2)
PIECE = 4096


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job() -> Job:
    torch.manual_seed(5)
    model = Net(0.0, width=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return replace(small_job(dropout=0.0), model=model, optimizer=optimizer, ema=Ema(model, decay=0.9))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of one process, whose digests cover 4 KB each, so that small files have many."""
    place = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "CHUNK", PIECE)
        fit(job(), place, LOOP)
        yield place


def resumed(run: Path, notes: Path, size: int, step: int = 4, **fields: Any) -> list[dict[str, int]]:
    """Resume on some ranks, compare every live tensor with the file's; what each rank read and handed on."""

    def work(world: World) -> None:
        loads: list[whole.WholeFiles] = []
        real = whole.WholeFiles.__init__

        def noting(self: whole.WholeFiles, *args: Any) -> None:
            real(self, *args)
            loads.append(self)

        whole.WholeFiles.__init__ = noting  # type: ignore[method-assign]
        mine = job()
        fit(mine, run, replace(LOOP, updates=step, parallel="fsdp", **fields), world=world, allow=("updates",))
        state = checkpoint.load(run / "checkpoints" / f"step-{step:06}")
        assert mine.ema is not None
        live = {
            "model": stored_tensors(mine.model, base=False)[0],
            "optimizer": optimizer_state(mine.model, mine.optimizer)[0],
            "ema": mine.ema.tensors,
        }
        for part, tensors in live.items():
            saved = getattr(state, part)
            assert set(tensors) == set(saved)
            for name, tensor in tensors.items():
                want = saved[name]
                if isinstance(tensor, DTensor):
                    want = distribute_tensor(want, tensor.device_mesh, tensor.placements).to_local()
                    tensor = tensor.to_local()
                assert torch.equal(tensor, want), (part, name)
        note = {"read": sum(one.bytes_read for one in loads), "handed": sum(one.bytes_handed for one in loads)}
        (notes / f"{world.rank}.json").write_text(json.dumps(note))

    assert ranks(size, work) == [0] * size
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize(("size", "fields"), [(2, {}), (3, {}), (4, {"replicas": 2})])
def test_every_byte_is_read_once_over_all_ranks(run: Path, tmp_path: Path, size: int, fields: dict[str, int]) -> None:
    stored = sum(p.stat().st_size for p in (run / "checkpoints" / "step-000004").glob("*.safetensors"))
    notes = resumed(run, tmp_path, size, **fields)
    assert sum(note["read"] for note in notes) == stored > 20 * PIECE
    assert max(note["read"] for note in notes) <= stored / size + 3 * PIECE
    if "replicas" not in fields:  # what is handed on is a part of what is needed
        assert sum(note["handed"] for note in notes) < stored


@pytest.mark.parametrize("kind", ["flipped", "cut"])
def test_damage_is_named_and_all_ranks_take_the_one_before(run: Path, tmp_path: Path, kind: str, capfd: Any) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / "checkpoints" / "step-000004" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data if kind == "flipped" else data[:-7])
    (code,) = {finding.code for finding in tk.verify(path.parent)[0]}
    assert code == ("F03" if kind == "flipped" else "F02")
    resumed(copy, tmp_path, 2, step=2)


def test_another_model_is_refused_before_anything_is_read(run: Path, tmp_path: Path) -> None:
    def work(world: World) -> None:
        other = replace(job(), model=Net(0.0, width=32))
        other.optimizer.param_groups[0]["params"] = [p for p in other.model.parameters() if p.requires_grad]
        other = replace(other, ema=Ema(other.model, decay=0.9))
        with pytest.raises(tk.TensorkeepError) as caught:
            fit(other, tmp_path / "new", replace(LOOP, parallel="fsdp"), resume=run, world=world)
        assert caught.value.code == "K01"

    assert ranks(2, work) == [0, 0]


def test_pieces_go_to_who_needs_most_of_them_and_all_read_about_as_much() -> None:
    np = whole.np
    cut = [np.array([[0, 100], [200, 230]], np.int64), np.array([[100, 200], [230, 300]], np.int64)]
    pieces = [whole._Piece("a", n, 50 * n, 50 * n + 50) for n in range(6)]
    plan = whole._plan(pieces, cut)
    assert [[p and p.number for p in turn] for turn in plan] == [[0, 2], [1, 3], [4, 5]]
    alike = whole._plan(pieces, [np.array([[0, 300]], np.int64)] * 3)
    assert [sum(p is not None for p in (turn[r] for turn in alike)) for r in range(3)] == [2, 2, 2]
