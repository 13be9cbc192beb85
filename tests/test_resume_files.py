"""verify and diagnose look at every file beside the weights that a resume reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.verification import verify
from tests.checkpoints import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as transformers' Trainer lays it out, of two processes."""
    place = tmp_path / "checkpoint-3"
    write_model(place, "Llama")
    torch.save({"state": {0: {"exp_avg": torch.randn(64, 8)}}, "param_groups": []}, place / "optimizer.pt")
    torch.save({"last_epoch": 3}, place / "scheduler.pt")
    for rank in range(2):
        torch.save({"cpu": torch.get_rng_state()}, place / f"rng_state_{rank}.pth")
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": []}))
    (place / "optimizer_0").mkdir()
    torch.save({"part": torch.randn(64)}, place / "optimizer_0" / "shard.pt")
    return place


FILES = ("optimizer.pt", "scheduler.pt", "rng_state_1.pth", "trainer_state.json", "optimizer_0/shard.pt")


def test_a_whole_folder_is_ok(folder: Path) -> None:
    assert verify(folder)[0] == [] and "F02" not in diagnose(str(folder)).causes


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_cut_or_empty_file_is_named(folder: Path, name: str, how: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    (found,) = verify(folder)[0]
    assert (found.severity, found.tensors) == ("error", [name]) and found.code in ("F02", "F07")
    assert name in found.message
    assert found.code in diagnose(str(folder)).causes


def test_a_flipped_bit_is_found_by_the_archives_checksum(folder: Path) -> None:
    path = folder / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[data.find(torch.load(path)["state"][0]["exp_avg"].numpy().tobytes()) + 9] ^= 4
    path.write_bytes(data)
    (found,) = verify(folder)[0]
    assert (found.code, found.tensors) == ("F03", ["optimizer.pt"])


def test_a_trainer_state_without_a_step_is_named(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("{}")
    (found,) = verify(folder)[0]
    assert (found.code, found.tensors) == ("F07", ["trainer_state.json"])


def test_beside_a_file_that_was_named_alone_nothing_is_looked_at(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"")
    assert verify(folder / "model.safetensors")[0] == []
