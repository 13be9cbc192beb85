"""accelerate's own save_state and load_state inside ours: whole or not there, strict, and exact with data in order."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.seals import seal as seal_folder
from tensorkeep.integrations.accelerate import load_state, register, save_state
from tensorkeep.storage.run_manifest import read_manifest
from tensorkeep.training.randomness import order
from tests import forked

accelerate = pytest.importorskip("accelerate")

STEPS = 8


class Net(nn.Module):
    """A frozen base under a trained head, with a buffer that training changes, dropout and a tie."""

    def __init__(self, seed: int = 0, trained: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(6, 12).requires_grad_(trained)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 6)
        self.back = nn.Linear(6, 12)
        self.back.weight = nn.Parameter(self.head.weight.T.contiguous())
        self.again = nn.Linear(12, 6, bias=False)
        self.again.weight = self.head.weight  # tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.back(self.head(self.drop(self.norm(self.base(x))))))  # [B, 6]


class Loop:
    """A documented accelerate loop; its data order is a function of the step, so that a resume needs no skipping."""

    def __init__(self, seed: int = 0, trainable_only: bool = True) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        model = Net(seed, trained=not trainable_only)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.data = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
        self.step = 0
        self.losses: list[str] = []
        register(self.accelerator, trainable_only)

    def run(self, until: int, out: Path | None = None) -> Loop:
        self.model.train()
        while self.step < until:
            rows = order(0, self.step // 4, 16)[(self.step % 4) * 4 :][:4]
            x = self.data[torch.from_numpy(rows)]
            loss = (self.model(x) - x).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.losses.append(loss.item().hex())
            if out is not None:
                save_state(self.accelerator, out / f"step_{self.step}", keep_last=3)
        return self

    def resume(self, out: Path) -> Loop:
        folder = load_state(self.accelerator, out)
        self.step = int(folder.name.split("_")[1]) if folder else 0
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in self.accelerator.unwrap_model(self.model).state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def seeded(seed: int = 0, trainable_only: bool = True) -> Loop:
    loop = Loop(seed, trainable_only)
    torch.manual_seed(7)
    return loop


@pytest.fixture(scope="module")
def uninterrupted() -> Loop:
    return seeded().run(STEPS)


class Killed(BaseException):
    pass


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Killed inside accelerate's own writing of step 6, at the optimizer."""
    loop = seeded().run(5, tmp_path)
    real = torch.save

    def cut(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        patch.setattr("tensorkeep.storage.placement.remove", lambda path: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            loop.run(6, tmp_path)
    assert torch.save is real
    return tmp_path


def test_a_run_killed_inside_a_save_goes_on_bitwise(killed: Path, uninterrupted: Loop) -> None:
    assert len([p for p in killed.iterdir() if p.name.endswith(".tensorkeep-tmp")]) == 1
    loop = seeded(seed=0).resume(killed)
    assert loop.step == 5
    loop.run(STEPS, killed)
    assert loop.losses == uninterrupted.losses[5:]
    assert equal(loop.weights(), uninterrupted.weights())
    assert sorted(p.name for p in killed.iterdir()) == ["step_6", "step_7", "step_8"]


def flip_a_bit(path: Path, at: int) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= 4
    path.write_bytes(blob)


@pytest.mark.parametrize("kind", ["weights", "moments", "random", "missing", "cut", "manifest"])
def test_a_damaged_newest_is_passed_over_and_named(
    kind: str, tmp_path: Path, uninterrupted: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    seeded().run(5, tmp_path)
    newest = tmp_path / "step_5"
    if kind == "missing":
        (newest / "scheduler.bin").unlink()
    elif kind == "cut":
        (newest / "optimizer.bin").write_bytes((newest / "optimizer.bin").read_bytes()[:-64])
    else:
        files = {"weights": "adapter.safetensors", "moments": "optimizer.bin", "random": "random_0.json"}
        flip_a_bit(newest / files.get(kind, "manifest.json"), -40)
    with caplog.at_level(logging.WARNING):
        loop = seeded().resume(tmp_path)
    assert loop.step == 4 and "step_5" in caplog.text and newest.is_dir()
    loop.run(STEPS)
    assert loop.losses == uninterrupted.losses[4:] and equal(loop.weights(), uninterrupted.weights())


def test_frozen_weights_stay_out_and_tied_ones_go_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    seeded().run(1, tmp_path)
    names = set(load_file(tmp_path / "step_1" / "adapter.safetensors"))
    assert names == {
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
        *("head.weight", "head.bias", "back.weight", "back.bias"),
    }
    assert not (tmp_path / "step_1" / "model.safetensors").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    seeded().run(1, tmp_path)
    with pytest.raises(TensorkeepError, match="trained on frozen weights") as caught:
        seeded(seed=5).resume(tmp_path)
    assert caught.value.code == "A04"


def test_a_model_that_differs_is_refused_whole(tmp_path: Path) -> None:
    seeded().run(1, tmp_path)
    loop = seeded()
    loop.model.head.bias = None  # the file holds one tensor more than the model trains
    before = loop.weights()
    with pytest.raises(TensorkeepError, match=r"not in the run: head\.bias") as caught:
        loop.resume(tmp_path)
    assert caught.value.code == "K01" and equal(loop.weights(), before)


def test_everything_goes_where_all_of_it_is_wanted(tmp_path: Path) -> None:
    loop = seeded(trainable_only=False).run(2, tmp_path)
    other = seeded(seed=3, trainable_only=False).resume(tmp_path)
    assert equal(other.weights(), loop.weights())


def test_the_hooks_alone_are_strict_and_digested_too(tmp_path: Path) -> None:
    """With accelerate's own save_state and load_state around them."""
    loop = seeded().run(2)
    loop.accelerator.save_state(str(tmp_path / "plain"))
    other = seeded()
    other.accelerator.load_state(str(tmp_path / "plain"))
    assert equal(other.weights(), loop.weights())
    flip_a_bit(tmp_path / "plain" / "adapter.safetensors", -30)
    with pytest.raises(TensorkeepError, match="damaged since it was written") as caught:
        other.accelerator.load_state(str(tmp_path / "plain"))
    assert caught.value.code == "F03" and caught.value.tensors


def test_nan_is_refused_and_what_was_there_stays(tmp_path: Path) -> None:
    loop = seeded().run(2, tmp_path)
    loop.model.head.bias.data[1] = float("nan")
    with pytest.raises(TensorkeepError, match=r"head\.bias") as caught:
        save_state(loop.accelerator, tmp_path / "step_2")  # over a good one
    assert caught.value.code == "V01"
    assert seeded().resume(tmp_path).step == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_a_folder_with_anything_else_in_it_is_not_saved_over(tmp_path: Path) -> None:
    loop = seeded().run(1, tmp_path)
    save_state(loop.accelerator, tmp_path / "step_1")  # over a sealed one
    (tmp_path / "step_1" / "notes").mkdir()
    (tmp_path / "step_1" / "notes" / "thesis.tex").write_text("years of work")
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_7" / "thesis.tex").write_text("years of work")
    for name, inner in (("step_1", "notes/thesis.tex"), ("step_7", "thesis.tex")):
        with pytest.raises(TensorkeepError, match="thesis"):
            save_state(loop.accelerator, tmp_path / name)
        assert (tmp_path / name / inner).read_text() == "years of work"


def test_names_without_a_number_and_automatic_naming_are_refused(tmp_path: Path) -> None:
    loop = seeded()
    with pytest.raises(TensorkeepError, match="does not end in a number"):
        save_state(loop.accelerator, tmp_path / "latest")
    loop.accelerator.project_configuration.automatic_checkpoint_naming = True
    with pytest.raises(TensorkeepError, match="automatic_checkpoint_naming"):
        save_state(loop.accelerator, tmp_path / "step_1")


def test_nothing_there_starts_anew_and_nothing_valid_does_not(tmp_path: Path) -> None:
    assert load_state(seeded().accelerator, tmp_path / "none") is None
    seeded().run(2, tmp_path)
    for folder in tmp_path.iterdir():
        flip_a_bit(folder / "optimizer.bin", 200)
    with pytest.raises(TensorkeepError, match="none of its 2 checkpoints is valid"):
        load_state(seeded().accelerator, tmp_path)


def test_a_process_more_than_saved_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seeded().run(1, tmp_path)
    folder = tmp_path / "step_1"
    (folder / "random_0.json").unlink()
    seal_folder(folder, 1, read_manifest(folder).base)
    with caplog.at_level(logging.WARNING):
        seeded().resume(tmp_path)
    assert "no random states of process 0" in caplog.text


def _rank(rank: int, port: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    loop = seeded()
    torch.manual_seed(100 + rank)  # each process draws its own dropout
    loop.run(3, Path(out))
    whole = loop.run(5).losses[3:]
    again = Loop().resume(Path(out))
    assert again.step == 3
    again.run(5)
    assert again.losses == whole and equal(again.weights(), loop.weights())
    Path(out, f"done_{rank}").touch()


@pytest.mark.slow
def test_two_processes_save_one_checkpoint_and_go_on_bitwise(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_integrations_accelerate import _rank as run; "
    code += "run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    words = [sys.executable, "-c", code]
    ranks = [forked.Popen([*words, rank, port, tmp_path], cwd=Path(__file__).parents[1]) for rank in (0, 1)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert {"done_0", "done_1"} <= {p.name for p in tmp_path.iterdir()}
    assert {"random_0.json", "random_1.json"} <= {p.name for p in (tmp_path / "step_3").iterdir()}
