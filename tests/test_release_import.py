"""YAML configs of the ActionFormer and TriDet releases become recipes, with an account of what stayed behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorkeep import cli
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.opentad.recipe import Imported
from tensorkeep.detection.opentad.release import import_release
from tensorkeep.detection.recipe.text import read_recipe
from tensorkeep.errors import TensorkeepError

ACTIONFORMER: dict[str, Any] = {
    "dataset_name": "thumos",
    "train_split": ["validation"],
    "val_split": ["test"],
    "dataset": {
        "json_file": "a.json",
        "feat_folder": "features",
        "file_prefix": None,
        "file_ext": ".npy",
        "num_classes": 20,
        "input_dim": 16,
        "feat_stride": 4,
        "num_frames": 16,
        "trunc_thresh": 0.5,
        "crop_ratio": [0.9, 1.0],
        "max_seq_len": 576,
    },
    "model": {"fpn_type": "identity", "n_mha_win_size": 19, "embd_dim": 32, "fpn_dim": 32, "head_dim": 24},
    "opt": {"learning_rate": 0.0001, "epochs": 30, "weight_decay": 0.05},
    "loader": {"batch_size": 2},
    "train_cfg": {"init_loss_norm": 100, "clip_grad_l2norm": 1.0},
    "test_cfg": {"voting_thresh": 0.7, "pre_nms_topk": 2000, "max_seg_num": 200, "min_score": 0.001},
    "output_folder": "ckpt",
}
SGP = {"n_sgp_win_size": 3, "sgp_mlp_dim": 48, "k": 1.3, "num_bins": 12, "input_noise": 0.5, "head_kernel_size": 5}


def changed(**parts: Any) -> dict[str, Any]:
    """The config with other sections or values; a section given as a dict is merged."""
    made = json.loads(json.dumps(ACTIONFORMER))
    for name, value in parts.items():
        made[name] = {**made[name], **value} if isinstance(value, dict) else value
    return made


def imported(folder: Path, document: Any) -> Imported:
    (folder / "c.yaml").write_text(yaml.safe_dump(document))
    return import_release(folder / "c.yaml")


def test_actionformers_config_is_a_recipe(tmp_path: Path) -> None:
    found = imported(tmp_path, ACTIONFORMER)
    made = found.recipe
    assert (made.model.kind, made.model.projection.level_windows[0], made.model.projection.max_length) == (
        "actionformer",
        19,
        576,
    )
    assert (made.model.head.convs, made.model.head.loss_normalizer, made.model.head.strides[-1]) == (2, 100, 32)
    assert (made.data.mode, made.data.offset_frames, made.data.feature_layout) == ("whole", 8, "tc")
    assert (made.schedule.warmup, made.training.epochs, made.optimizer.weight_decay) == (5, 35, 0.05)
    assert (made.post_processing.nms.sigma, made.post_processing.nms.voting, made.training.clip) == (0.5, None, 1.0)
    assert made.evaluation.thresholds == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert {row.path for row in found.lost} == {"test_cfg.duration_thresh", "test_cfg.pre_nms_topk"}
    assert {row.path for row in found.left} == {"output_folder", "test_cfg.voting_thresh"}
    assert "opt.warmup_epochs" in {row.path for row in found.defaults}
    Detector(made.model)
    (tmp_path / "recipe.yaml").write_text(found.text())
    assert read_recipe(tmp_path / "recipe.yaml") == made


def test_tridets_config_is_one_too(tmp_path: Path) -> None:
    data = {"num_classes": 1, "force_upsampling": True, "default_fps": 15}
    document = changed(model=SGP, dataset=data, opt={"eta_min": 5e-5}, test_cfg={"ext_score_file": "s.json"})
    del document["model"]["n_mha_win_size"]
    made = imported(tmp_path, document).recipe
    model: Any = made.model
    assert (model.kind, model.projection.windows, model.projection.wide, model.head.bins) == ("tridet", (3,), 1.3, 12)
    assert (model.head.kernel_size, model.head.boundary_kernel_size, model.head.iou_power) == (5, 3, 1.0)
    assert (made.data.mode, made.data.class_agnostic, made.data.fps, made.schedule.floor) == ("resized", True, 15, 5e-5)
    assert made.post_processing.classifier is not None and made.post_processing.classifier.rule == "geometric"
    Detector(replace(made.model, backbone=None))


def test_each_of_several_feature_files_is_projected_on_its_own(tmp_path: Path) -> None:
    folders, wide = ["slowfast", "omnivore", "egovlp"], {"embd_dim": [4, 8, 4], "fpn_dim": 16, "head_dim": 16}
    document = changed(dataset={"input_dim": [9, 6, 1], "feat_folder": folders, "file_ext": ".npz"}, model=wide)
    found = imported(tmp_path, document)
    projection = found.recipe.model.projection
    assert (projection.in_channels, projection.channels) == (16, 16) and found.recipe.data.train.folders == tuple(
        folders
    )
    assert projection.per_file == ((9, 4), (6, 8), (1, 4)) and Detector(found.recipe.model)
    assert {row.path for row in found.lost} == {"test_cfg.duration_thresh", "test_cfg.pre_nms_topk"}
    with pytest.raises(TensorkeepError, match="TriDet has no convolution of its own"):
        imported(tmp_path, {**document, "model": {**document["model"], **SGP}})


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"model": {"fpn_type": "fpn"}}, "fpn_type 'fpn' is not one that is built here"),
        ({"model": {"use_rel_pe": True}}, "use_rel_pe True"),
        ({"model": {**SGP, "use_trident_head": False}}, "use_trident_head False"),
        ({"dataset": {"input_dim": [16, 16]}}, r"in_channels \[16, 16\] and out_channels \d+ are not one number each"),
        ({"opt": {"type": "SGD"}}, "type 'SGD'"),
        ({"val_split": ["training", "validation"]}, "scored on one subset"),
        ({"model": {"n_mha_win_size": [3, 3]}}, "windows has 2 entries"),
        ({"dataset": {"max_seq_len": "long"}}, "form that the release gives it"),
        ({"test_cfg": {"nms_method": "none"}}, "unknown suppression method 'none'"),
        ({"opt": None}, "is no section of settings"),
    ],
)
def test_what_is_not_built_here_is_named(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(TensorkeepError, match=what) as caught:
        imported(tmp_path, changed(**changes))
    assert "c.yaml" in str(caught.value)


def test_an_unknown_setting_is_lost_and_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = changed(model={"n_heads": 8}, train_cfg={"head_empty_cls": [4]})
    lost = {row.path for row in imported(tmp_path, document).lost}
    assert {"model.n_heads", "train_cfg.head_empty_cls"} <= lost
    words = ["recipe", "import", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "r.yaml")]
    assert cli.main(words) == 1 and "model.n_heads" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("model: {}\n")
    assert cli.main([*words, "--overwrite"]) == 2
    assert "no config of ActionFormer or TriDet" in capsys.readouterr().err


def test_folders_and_subsets_may_be_lists(tmp_path: Path) -> None:
    folders = ["features/rgb", "features/flow"]
    parts = {"dataset": {"feat_folder": folders}, "train_split": ["training", "validation"]}
    made = imported(tmp_path, changed(**parts))
    data = made.recipe.data
    assert data.train.folders == data.test.folders == tuple(folders) and data.feature_rows == "equal"
    assert data.train.subset == ("training", "validation")
