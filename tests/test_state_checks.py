"""Checks of averages and of training state name faults by code; files of other programs give no errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import pytest
import torch

from tensorkeep.training.saver import State
from tensorkeep.training.saver import save as save_checkpoint
from tests import quant_files as files
from tests.quant_files import MINIMIND, SHARED, findings, gaussian, model, needs_minimind, said


def torch_model(seed: int = 0, spread: float = 0.02) -> dict[str, torch.Tensor]:
    return {
        f"module.backbone.blocks.{i}.fc.weight": torch.from_numpy(gaussian((16, 64), seed + i, spread))
        for i in range(3)
    }


def save(path: Path, **parts: Any) -> str:
    torch.save(parts, path)
    return str(path)


def blended(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    return {n: torch.lerp(a[n], b[n], share) for n in a}


def test_a_sound_average_raises_nothing(tmp_path: Path) -> None:
    live = torch_model()
    path = save(tmp_path / "e.pth", epoch=3, state_dict=live, state_dict_ema=blended(live, torch_model(9), 0.03))
    found, _ = findings(path, None, "E")
    assert found == []


def test_an_average_that_equals_the_model(tmp_path: Path) -> None:
    found, _ = findings(
        save(tmp_path / "e.pth", epoch=3, state_dict=torch_model(), state_dict_ema=torch_model()), None, "E"
    )
    assert said(found, "warning") == {"E01"} and "training has begun" in found[0].message


def test_an_average_of_packed_codes_is_an_error_and_unchanged_ones_a_warning(tmp_path: Path) -> None:
    live: dict[str, torch.Tensor] = dict(torch_model())
    parts = files.named("module.adapter.down_proj.weight", files.four_bit(gaussian((16, 64), 5), nested=True))
    live |= {n: torch.from_numpy(t.copy()) for n, t in parts.items()}
    live["module.head.loss_normalizer"] = torch.tensor(100)
    moved = {n: (t + 0.001 if t.is_floating_point() and ".fc." in n else t.clone()) for n, t in live.items()}
    found, _ = findings(save(tmp_path / "same.pth", state_dict=live, state_dict_ema=moved), None, "E")
    assert (said(found), said(found, "warning")) == (set(), {"E02"})
    name = "module.adapter.down_proj.weight"
    moved[name] = torch.from_numpy(files.averaged_bytes(live[name].numpy(), 0.9999, 50))
    found, _ = findings(save(tmp_path / "e.pth", state_dict=live, state_dict_ema=moved), None, "E")
    assert said(found) == {"E02"}


def test_an_average_that_lags(tmp_path: Path) -> None:
    start, live = torch_model(1), torch_model(2)
    path = save(tmp_path / "e.pth", epoch=1, state_dict=live, state_dict_ema=blended(live, start, 0.9))
    assert said(findings(path, None, "E")[0], "warning") == {"E03"}
    near = save(
        tmp_path / "n.pth", decay=0.9999, updates=1000, state_dict=live, state_dict_ema=blended(live, start, 0.05)
    )
    assert said(findings(near, None, "E")[0], "warning") == {"E03"}
    first = save(tmp_path / "start.pth", state_dict=start)
    path = save(tmp_path / "q.pth", epoch=1, state_dict=live, state_dict_ema=blended(live, start, 0.2))
    found, _ = findings(path, first, "E")
    assert abs(next(f for f in found if f.code == "E03").evidence["share_of_start"] - 0.2) < 0.01


# -- training state ---------------------------------------------------------------------------------------------------


@needs_minimind
def test_a_minimind_resume_file_is_imperfect_and_sound() -> None:
    found, undecided = findings(MINIMIND / "mm3_dense/checkpoints/pretrain_64_resume.pth")
    assert (said(found), said(found, "warning"), undecided) == (set(), {"R01", "R02", "R05", "R06"}, set())
    by_code = {f.code: f.evidence for f in found}
    assert (by_code["R05"]["states"], by_code["R05"]["shapes_fit_in_order"]) == (24, True)
    assert (by_code["R06"]["weights"], by_code["R06"]["moments"]) == (["F16"], ["F32"])
    assert (by_code["R02"]["epoch"], by_code["R02"]["step"]) == (1, 20)
    assert findings(MINIMIND / "mm3_dense/out/pretrain_64.pth", None, "R")[0] == []
    found, _ = findings(
        MINIMIND / "mm3_ws2/checkpoints/pretrain_64_resume.pth",
        MINIMIND / "mm3_dense/checkpoints/pretrain_64_resume.pth",
        "R",
    )
    assert {f.evidence["world_size"] for f in found if f.code == "R03"} == {2}


def test_states_in_the_order_of_parameter_groups_are_called_sound_and_those_of_another_model_are_not(
    tmp_path: Path,
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]  # as Trainer does
    optimizer = torch.optim.AdamW(groups)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    path = save(tmp_path / "a.pth", epoch=1, model=model.state_dict(), optimizer=optimizer.state_dict())
    (found,) = [f for f in findings(path, None, "R")[0] if f.code == "R05"]
    assert (found.evidence["shapes_fit"], found.evidence["shapes_fit_in_order"]) == (True, False)
    assert "same parameter groups is right" in found.message
    other = {n: t if t.dim() < 2 else t.repeat(2, 1) for n, t in model.state_dict().items()}
    path = save(tmp_path / "b.pth", epoch=1, model=other, optimizer=optimizer.state_dict())
    (found,) = [f for f in findings(path, None, "R")[0] if f.code == "R05"]
    assert found.evidence["shapes_fit"] is False and "shapes are not those of the weights" in found.message


@pytest.mark.skipif(not (SHARED / "conversion").is_dir(), reason="the shared conversion fixtures are not here")
def test_a_torchtitan_trainer_folder_is_imperfect_and_sound() -> None:
    found, _ = findings(SHARED / "conversion/open/titan030_trainer_llama_tied_bf16/checkpoint/step-3", None, "R")
    assert (said(found), said(found, "warning"), said(found, "info")) == (set(), {"R01"}, {"R02", "R03"})


def test_a_run_with_everything_raises_nothing(tmp_path: Path) -> None:
    state = {
        "step": 10,
        "samples": 640,
        "world_size": 1,
        "rng": {"torch": "..."},
        "recipe": {"lr": 1e-3, "data": {"seed": 1}},
    }
    tensors = {n: torch.from_numpy(t.copy()) for n, t in model(1).items()}
    moments = {f"{n}/exp_avg": t.clone() for n, t in tensors.items()}
    step = save_checkpoint(tmp_path / "run", State(tensors, moments, {}, state))
    (tmp_path / "run/recipe.yaml").write_text("lr: 0.001\ndata: {seed: 1}\n")
    assert findings(step, None, "R")[0] == []
    (tmp_path / "run/recipe.yaml").write_text("lr: 0.002\ndata: {seed: 1}\n")
    found, _ = findings(step, None, "R")
    assert [(f.code, f.severity) for f in found] == [("R04", "warning")] and "lr" in found[0].evidence


def test_a_trainer_folder_without_random_state(tmp_path: Path) -> None:
    files.write(tmp_path, {n: t.astype(ml_dtypes.bfloat16) for n, t in model(1).items()})
    weights = [torch.nn.Parameter(torch.from_numpy(t.copy())) for t in model(1).values()]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "epoch": 0.5}))
    found, _ = findings(tmp_path, None, "R")
    assert (said(found), said(found, "warning")) == (set(), {"R01", "R02", "R05", "R06"})
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    (tmp_path / "optimizer.pt").unlink()
    found, _ = findings(tmp_path, None, "R")
    assert said(found, "warning") == {"R02", "R05"}
    assert "moments would start at zero" in next(f.message for f in found if f.code == "R05")
