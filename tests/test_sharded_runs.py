"""Checkpoints of sharded runs: every rank its own part, one view for every command, damage named and passed over."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import tensorkeep as tk
from tensorkeep.cli import main
from tensorkeep.formats.run import read_part
from tensorkeep.storage.run_manifest import read_manifest
from tensorkeep.training import _shard_work
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World
from tensorkeep.training.ema import Ema
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tests.training import Net, assert_same_run, ranks, relative_l2, shards_of, small_job

LOOP = Loop(updates=6, batch=5, micro=1, log_every=1, save_every=2, parallel="fsdp")


def train(run: Path, size: int, until: int = 6, dropout: float = 0.2, **fields: Any) -> list[int]:
    def work(world: World) -> None:
        torch.manual_seed(77 + world.rank)
        if fields.pop("nothing_whole", False):
            refuse_whole_tensors()
        fit(small_job(dropout=dropout), run, replace(LOOP, updates=until, **fields), world=world, allow=("updates",))

    return ranks(size, work)


def refuse_whole_tensors() -> None:
    real = DTensor.full_tensor

    def refusing(self: DTensor, **more: Any) -> torch.Tensor:
        assert self.numel() == 1, "a tensor was gathered"
        return real(self, **more)

    DTensor.full_tensor = refusing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sharded") / "run"
    assert train(place, 2, nothing_whole=True) == [0, 0]
    return place


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_every_rank_writes_its_own_part_and_the_parts_are_the_whole(run: Path) -> None:
    step = run / "checkpoints" / "step-000006"
    manifest = read_manifest(step)
    lists = {"__0_0.shards.json", "__1_0.shards.json"}
    assert set(manifest.files) == {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", *lists}
    sizes = [sum(shard.nbytes for shard in own) for own in shards_of(step).values()]
    assert max(sizes) < 0.75 * sum(sizes)
    state = checkpoint.load(step)
    for part in ("model", "optimizer", "ema"):
        view, tensors = read_part(step, part), getattr(state, part)
        assert view is not None and list(view) and set(view) == set(tensors)
        assert all(torch.equal(view.tensor(n), t) and view.tensor(n).dtype == t.dtype for n, t in tensors.items())


def test_the_commands_read_it_as_one_view(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert main(["inspect", str(run)]) == 0
    assert "leave.bias" in capsys.readouterr().out
    assert main(["convert", str(run), str(tmp_path / "all.pth"), "--to", "pth"]) == 0
    written, state = torch.load(tmp_path / "all.pth", weights_only=True), checkpoint.load(tk.read(run).folder.path)
    assert all(torch.equal(written[name], tensor) for name, tensor in state.model.items())
    assert main(["diff", str(run), str(tmp_path / "all.pth")]) == 0
    assert main(["diff", str(run), str(run / "checkpoints" / "step-000004")]) == 1
    capsys.readouterr()
    assert main(["diagnose", str(run), "--json"]) == 3  # a net without a config
    codes = {finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert codes == {"C03", "K01", "R03"}  # as of a whole one; no optimizer state is missed (R05)


@pytest.mark.parametrize("size", [1, 2])
def test_damage_is_named_and_any_number_of_ranks_goes_on_from_the_one_before(copy: Path, run: Path, size: int) -> None:
    step = copy / "checkpoints" / "step-000006"
    shard = max((s for s in shards_of(step)["__1_0.distcp"]), key=lambda s: s.nbytes)
    data = bytearray((step / "__1_0.distcp").read_bytes())
    data[shard.start + 5] ^= 16
    (step / "__1_0.distcp").write_bytes(data)
    findings, _, _ = tk.verify(step)
    assert [f.code for f in findings] == ["F03"] and list(findings[0].tensors) == [shard.tensor]
    assert train(copy, size) == [0] * size
    assert tk.verify(step)[0] == []
    if size == 2:
        assert_same_run(run, copy)


def test_a_named_checkpoint_that_is_damaged_is_no_other(copy: Path, tmp_path: Path) -> None:
    step = copy / "checkpoints" / "step-000006"
    with (step / "__0_0.distcp").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(tk.TensorkeepError) as caught:
        fit(small_job(dropout=0.2), tmp_path / "new", replace(LOOP, parallel="ddp"), resume=step)
    assert caught.value.code == "F02" and caught.value.tensors


def test_a_checkpoint_of_another_model_is_refused_before_a_weight_is_touched(run: Path, tmp_path: Path) -> None:
    model = Net(0.2, width=8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = {"model": model, "optimizer": torch.optim.AdamW(trained, lr=1e-2), "ema": Ema(model, decay=0.9)}
    with pytest.raises(tk.TensorkeepError) as caught:
        fit(
            replace(small_job(dropout=0.2), **parts),
            tmp_path / "new",
            replace(LOOP, parallel="ddp"),
            resume=run / "checkpoints" / "step-000006",
        )
    assert caught.value.code == "K01"
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_written_behind_the_training_the_bits_are_the_same(run: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", 2, background=True, nothing_whole=True) == [0, 0]
    assert_same_run(run, tmp_path / "run")


def test_nan_on_one_rank_stops_all_and_the_checkpoint_before_stays(copy: Path) -> None:
    def work(world: World) -> None:
        job = small_job(dropout=0.2)
        loss = job.loss

        def poisoned(model: Any, batch: Any, divisor: float) -> Any:
            with torch.no_grad():
                weight = model.blocks[1][0].weight
                if world.rank == 1 and isinstance(weight, DTensor):
                    weight.to_local()[0, 0] = float("nan")
            return loss(model, batch, divisor)

        with pytest.raises(tk.TensorkeepError) as caught:
            fit(replace(job, loss=poisoned), copy, replace(LOOP, updates=8), world=world, allow=("updates",))
        assert caught.value.code == "V01"

    assert ranks(2, work) == [0, 0]
    assert checkpoint.steps(copy)[0] == 6


@pytest.mark.parametrize(
    ("instant", "victims"),
    [
        ("before the data", (1,)),
        ("before the data", (0, 1)),
        ("before the manifest", (0,)),
        ("before the manifest", (0, 1)),
        ("before the rename is durable", (0,)),
    ],
)
def test_killed_inside_a_save_the_older_one_is_the_newest_and_the_end_is_the_same(
    run: Path, tmp_path: Path, victims: tuple[int, ...], instant: str
) -> None:
    place = tmp_path / "run"

    def work(world: World) -> None:
        def dying(real: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                if world.rank in victims and count() > 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            return call

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        calls = 0
        if instant == "before the data":
            _shard_work.write = dying(_shard_work.write)
        elif instant == "before the manifest":
            _shard_work.gathered = dying(_shard_work.gathered)
        elif world.rank == 0:
            _shard_work.sync_folder = dying(_shard_work.sync_folder)
        torch.manual_seed(77 + world.rank)
        fit(small_job(dropout=0.2), place, LOOP, world=world)

    assert -signal.SIGKILL in ranks(2, work, seconds=60.0)
    newest = checkpoint.newest(place)
    step = 4 if instant == "before the rename is durable" else 2
    assert newest is not None and newest[0].document["step"] == step and newest[2] == []
    assert train(place, 2) == [0, 0]
    assert_same_run(run, place)
    assert not [p for p in (place / "checkpoints").iterdir() if p.name.startswith(".step")]


def test_a_whole_checkpoint_goes_on_in_shards(tmp_path: Path) -> None:
    assert train(tmp_path / "run", 2, until=2, dropout=0.0, parallel="ddp") == [0, 0]
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert train(tmp_path / "run", 2, dropout=0.0) == [0, 0]
    assert train(tmp_path / "ddp", 2, dropout=0.0, parallel="ddp") == [0, 0]
    assert relative_l2(tmp_path / "ddp", tmp_path / "run") < 1e-5
