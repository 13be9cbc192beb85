"""Training steps of every kind of detector and backbone as CUDA graphs, against the same steps launched; on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.detection.job import build
from tensorkeep.detection.model import kinds
from tensorkeep.detection.recipe.text import detection_recipe
from tensorkeep.output import Output
from tensorkeep.training import metrics, saver
from tensorkeep.training.distributed import World
from tensorkeep.training.loop import Outcome, fit
from tensorkeep.training.recipe import plain
from tests.detection import runs
from tests.detection.test_kinds import PARTS, with_kind
from tests.detection.test_training import features
from tests.gpu import needs_gpu
from tests.run_states import equal
from tests.training import assert_same_run, rows

SWIN = {"channels": 8, "depths": [2, 2], "heads": [2, 2], "window": [2, 3, 3], "drop_path": 0.1}
REVERSIBLE = {"kind": "reversible_swin", "swin": SWIN, "tuning": "all", "checkpointing": "reversible"}
# what of a tiny recipe is another, by name
VIDEO: dict[str, dict[str, Any]] = {
    "none": {"checkpointing": "none"},
    "segments": {"checkpointing": "segments"},
    "two_level": {"checkpointing": "two_level"},
    "offload": {"checkpointing": "offload"},
    "bf16 and nf4": {"checkpointing": "segments", "frozen_dtype": "bfloat16"},
    "fp16": {"checkpointing": "segments"},
    "internvideo2": {"checkpointing": "segments", "kind": "internvideo2"},
    "vjepa2": {"checkpointing": "segments", "kind": "vjepa2"},
    "reversible_swin": {**REVERSIBLE, "output_length": 16, "freeze_norms": True},
}


def recipe_of(name: str, data: Path) -> Any:
    """A recipe on videos with drop path, by its name in `VIDEO`."""
    document = runs.document(data)
    backbone = document["model"]["backbone"]
    backbone |= VIDEO[name]
    if "swin" in VIDEO[name]:
        document["model"]["backbone"] = dict(VIDEO[name])
        document["model"]["projection"]["in_channels"] = 16
        document["optimizer"]["groups"] = [{"pattern": "^backbone", "lr": 1e-4}]
    else:
        backbone["vit"]["drop_path"] = 0.1
    document["training"] |= {"epochs": 3}
    if name == "bf16 and nf4":
        document["training"] |= {"precision": "bf16", "quantize_backbone": "nf4"}
    if name == "fp16":
        document["training"] |= {"precision": "fp16"}
    return detection_recipe(document)


def trained(made: Any, run: Path, **loop: Any) -> tuple[Outcome, list[float]]:
    """Train on the GPU; how it ended, and every loss."""
    world = World(device=torch.device("cuda"))
    job, how = build(made, run, world)
    outcome = fit(job, run, replace(how, **loop), world=world, say=Output())
    return outcome, [row["loss"] for row in metrics.rows(run / metrics.METRICS) if "loss" in row]


def compare(made: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left open, steps are recorded, and train as launched ones do; that they were is what nothing was said against."""
    _, launched = trained(made, folder / "launched", graph=False)
    capsys.readouterr()
    _, recorded = trained(made, folder / "recorded")
    assert "no CUDA graph" not in capsys.readouterr().err
    assert len(recorded) == len(launched) > 3
    assert recorded == pytest.approx(launched, rel=5e-3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    return runs.dataset(tmp_path_factory.mktemp("data"), videos=4, held_out=1)


@needs_gpu
@pytest.mark.parametrize("name", VIDEO)
def test_a_backbones_step_is_recorded(
    name: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(recipe_of(name, videos), tmp_path, capsys)


@needs_gpu
@pytest.mark.parametrize("kind", kinds.NAMES)
def test_a_detectors_step_is_recorded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = plain(features(tmp_path))
    compare(detection_recipe(with_kind(document, kind) if kind in PARTS else document), tmp_path, capsys)


@needs_gpu
def test_with_deterministic_kernels_a_recorded_run_is_the_launched_one_and_goes_on_exactly(
    videos: Path, tmp_path: Path
) -> None:
    made = recipe_of("segments", videos)
    trained(made, tmp_path / "launched", graph=False, deterministic=True)
    trained(made, tmp_path / "whole", deterministic=True)
    trained(made, tmp_path / "broken", deterministic=True, updates=4)
    world = World(device=torch.device("cuda"))
    job, loop = build(made, tmp_path / "broken", world)
    loop = replace(loop, deterministic=True)
    outcome = fit(job, tmp_path / "broken", loop, world=world, allow=("updates",))
    assert outcome.level == "exact"
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    one, other = (tmp_path / name for name in ("whole", "launched"))
    (a, _, _), (b, _, _) = (saver.newest(run) or (None, None, None) for run in (one, other))
    assert a is not None and b is not None and a.document["rng"] == b.document["rng"] and rows(one) == rows(other)
    assert all(equal(getattr(a, part), getattr(b, part)) for part in ("model", "optimizer", "ema"))
