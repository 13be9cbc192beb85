"""Pretraining on motions: clips are what they are called, the loss falls, and the ViT arrives in a detector whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")

from tensorkeep.conversion.execution import convert
from tensorkeep.conversion.planning import make_plan
from tensorkeep.detection import pretraining as motion_pretraining
from tensorkeep.detection.data.synthetic import TINY
from tensorkeep.detection.model.config import VitConfig
from tensorkeep.detection.pretraining import MotionClips, PretrainingConfig, build, pretrain
from tensorkeep.detection.start import make_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.training import metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.loop import fit
from tests.detection import runs

VIT = VitConfig(image_size=32, patch_size=16, embed_dim=32, depth=2, heads=2, mlp_dim=64, chunk_frames=8, drop_path=0.0)
SMALL = PretrainingConfig(
    VIT, replace(TINY, classes=("blink", "hop")), clips=24, held_out=9, updates=40, batch=12, lr=5e-3, save_every=15
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining") / "run"
    outcome = pretrain(SMALL, folder)
    assert outcome.step == SMALL.updates and 0 <= outcome.evaluation["accuracy"] <= 1
    return folder


def test_classes_take_turns_and_a_resting_clip_moves_least() -> None:
    clips = MotionClips(replace(SMALL, motions=replace(TINY, distractors=0)), 15, 0)
    change = torch.zeros(5)
    for index in range(15):
        frames, label = clips.clip(index)
        assert label == index % 5 and frames.shape == (3, 8, 32, 32) and frames.dtype == torch.uint8
        change[label] += frames.float().diff(dim=1).abs().mean()
    assert change.argmin() == 4 and change[4] < 0.7 * change[:4].min()


def test_a_clip_follows_from_seed_part_and_number_alone() -> None:
    one, again = MotionClips(SMALL, 6, 0), MotionClips(SMALL, 3, 0)
    for other in (MotionClips(SMALL, 3, 1), MotionClips(replace(SMALL, seed=101), 3, 0)):
        assert not any(torch.equal(one.clip(index)[0], other.clip(index)[0]) for index in range(3))
        assert other.fingerprint() != again.fingerprint()
    assert all(torch.equal(one.clip(index)[0], again.clip(index)[0]) for index in (2, 0, 1))


def test_the_loss_falls(run: Path) -> None:
    job, loop = build(SMALL)
    losses: list[float] = []
    job.trackers = [lambda row: losses.append(row.get("loss", 0.0))]
    fit(job, run.parent / "told", replace(loop, log_every=1, evaluate_every=None))
    assert sum(losses[30:40]) < 0.6 * sum(losses[:10])


def test_killed_on_the_way_it_ends_where_it_would_have(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 22:
            raise RuntimeError("gone")
        return loss(*arguments)

    loss = motion_pretraining.loss
    with monkeypatch.context() as patch:
        patch.setattr(motion_pretraining, "loss", dies)
        with pytest.raises(RuntimeError, match="gone"):
            pretrain(SMALL, tmp_path / "run")
    assert pretrain(SMALL, tmp_path / "run").level == "exact"
    ends = [checkpoint.newest(folder) for folder in (run, tmp_path / "run")]
    assert ends[0] is not None and ends[1] is not None
    for kind in ("model", "optimizer", "ema"):
        mine, theirs = (getattr(end[0], kind) for end in ends if end is not None)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(list(metrics.rows(tmp_path / "run" / "metrics.jsonl"))) == len(list(metrics.rows(run / "metrics.jsonl")))


def test_run_and_exported_file_give_a_detector_the_same_backbone_and_only_the_classifier_stays_behind(
    run: Path, tmp_path: Path
) -> None:
    newest = checkpoint.newest(run)
    assert newest is not None
    plan = make_plan([read(run)], "pth", naming="videomae", drop=["cls_head.*"])
    convert(plan, str(tmp_path / "vit.pth"), "pth")
    data = runs.dataset(tmp_path / "data", videos=1, held_out=1)
    said: list[str] = []
    sources = (run, tmp_path / "vit.pth")
    found = [
        make_detector(runs.recipe(data, training__pretrained=str(source)), None, remark=said.append)[0]
        for source in sources
    ]
    assert (
        "2 tensors left out (cls_head.fc_cls.bias, cls_head.fc_cls.weight)" in said[0]
        and "0 tensors left out" in said[1]
    )
    averaged, live = newest[0].ema, newest[0].model
    named = {
        name for name in found[0].state_dict() if name.startswith("backbone.") and "adapter" not in name.split(".")
    }
    assert named == {name for name in live if name.startswith("backbone.")} and len(named) > 20
    for name in sorted(named - {"backbone.pos_embed"}):
        assert torch.equal(found[0].state_dict()[name], averaged[name])
        if "fc_norm" not in name:  # a videomae file may lack it, so the detector's own stays
            assert torch.equal(found[1].state_dict()[name], live[name])


def test_a_run_of_another_shape_is_refused(run: Path, tmp_path: Path) -> None:
    data = runs.dataset(tmp_path / "data", videos=1, held_out=1)
    with pytest.raises(TensorkeepError, match=r"missing: blocks\.2"):
        make_detector(runs.recipe(data, training__pretrained=str(run), model__backbone__vit__depth=3), None)
