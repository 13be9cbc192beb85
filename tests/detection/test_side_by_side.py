"""Features of several files of one video: their rows are aligned and their channels put side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tensorkeep import cli
from tensorkeep.detection.data.annotations import parse_annotations
from tensorkeep.detection.data.clips import make_clips
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.readers import FeatureReader, WindowConfig
from tensorkeep.detection.job import check
from tensorkeep.detection.recipe.text import detection_recipe
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import to_yaml

from . import runs

WINDOW = WindowConfig("sliding", 16, feature_stride=12, window_overlap_ratio=0.5)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """RGB rows [40, 6] as .npy, flow rows [40, 3] as .pt, and flow of another rate [27, 3]."""
    noise = np.random.default_rng(0)
    made = [tmp_path / name for name in ("rgb", "flow", "slow")]
    for folder in made:
        folder.mkdir()
    np.save(made[0] / "a.npy", noise.normal(size=(40, 6)).astype(np.float32))
    torch.save(torch.from_numpy(noise.normal(size=(40, 3)).astype(np.float16)), made[1] / "a.pt")
    np.save(made[2] / "a.npy", noise.normal(size=(27, 3)).astype(np.float32))
    return made


def truth() -> Any:
    rows = [{"segment": [2.0, 8.0], "label": "x"}]
    database = {"a": {"subset": "training", "duration": 20.0, "frame": 500, "annotations": rows}}
    return parse_annotations({"database": database})


def test_channels_follow_the_order_of_the_folders(folders: list[Path]) -> None:
    reader = FeatureReader(9)
    [item], problems = find_items(truth(), "training", folders[:2], reader, pattern="{video}.npy")
    assert problems == [] and item.steps == 40
    shown = make_clips([item], WINDOW, reader).sample(1, torch.Generator())["inputs"]
    rgb, flow = np.load(folders[0] / "a.npy"), torch.load(folders[1] / "a.pt").numpy()
    assert torch.equal(shown, torch.from_numpy(np.concatenate([rgb, flow], 1, dtype=np.float32)[8:24].T))


def test_shorter_files_are_stretched_as_opentad_stretches_them(folders: list[Path]) -> None:
    reader = FeatureReader(9, resized=True)
    [item], problems = find_items(truth(), "training", [folders[2], folders[0]], reader)
    assert problems == [] and item.steps == 40
    slow, rgb = (torch.from_numpy(np.load(folders[k] / "a.npy")).T[None] for k in (2, 0))
    whole = torch.cat([F.interpolate(slow, 40, mode="linear", align_corners=False), rgb], 1)[0]
    data = make_clips([item], WINDOW, reader)
    for index in range(len(data)):
        shown = data.sample(index, torch.Generator())["inputs"]
        part = whole[:, 8 * index : 8 * index + 16]
        torch.testing.assert_close(shown[:, : part.shape[1]], part, rtol=0, atol=0)


def test_what_does_not_fit_is_one_error_with_video_files_and_rows(folders: list[Path]) -> None:
    with pytest.raises(TensorkeepError) as found:
        find_items(truth(), "training", [folders[0], folders[2]], FeatureReader(9))
    assert all(word in str(found.value) for word in ("a: ", "rgb/a.npy: 40 rows", "slow/a.npy: 27 rows"))
    with pytest.raises(TensorkeepError, match=r"6 \+ 3 channels are not 10: .*rgb/a.npy, .*flow/a.pt"):
        find_items(truth(), "training", folders[:2], FeatureReader(10))
    (folders[1] / "a.pt").unlink()
    with pytest.raises(TensorkeepError, match=r"a: .*flow: no a"):
        find_items(truth(), "training", folders[:2], FeatureReader(9), pattern="{video}.npy")


def recipe_document(folder: Path) -> dict[str, Any]:
    """A recipe over two folders of features, trained on two subsets."""
    noise, database = np.random.default_rng(0), {}
    for number in range(5):
        rows = noise.normal(size=(24, 8)).astype(np.float32)
        rows[6:12, number % 2] += 3
        for name, part in (("rgb", rows[:, :5]), ("flow", rows[:, 5:])):
            (folder / name).mkdir(exist_ok=True)
            np.save(folder / name / f"v{number}.npy", part)
        database[f"v{number}"] = {
            "subset": ("train", "val", "test")[number % 3],
            "duration": 24.0,
            "frame": 240,
            "annotations": [{"segment": [6.0, 12.0], "label": "ab"[number % 2]}],
        }
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    made = runs.document(folder)
    made["model"]["backbone"], made["model"]["projection"]["in_channels"] = None, 8
    for part, subset in (("train", ["train", "val"]), ("test", "test")):
        made["data"][part] |= {"folder": [str(folder / "rgb"), str(folder / "flow")], "subset": subset}
    made["data"] |= {"inputs": "features", "mode": "whole", "file_pattern": "{video}.npy", "feature_stride": 10}
    made["data"] |= {"augment": None, "class_map": None}
    made["optimizer"]["groups"] = []
    return made


def test_a_run_trains_and_is_scored_on_several_folders_and_subsets(tmp_path: Path, capsys: Any) -> None:
    recipe = detection_recipe(recipe_document(tmp_path))
    checked = check(recipe)
    assert (checked.videos, checked.actions, checked.lost) == (4, 4, 0)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert cli.main(["check", "detection", str(tmp_path / "recipe.yaml")]) == 0
    runs.trained(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "evaluation" in line]
    np.save(tmp_path / "flow" / "v0.npy", np.zeros((23, 3), np.float32))
    capsys.readouterr()
    cli.main(["check", "detection", str(tmp_path / "recipe.yaml")])
    said = capsys.readouterr()
    assert "v0" in said.out + said.err and "flow/v0.npy: 23 rows" in said.out + said.err


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("test", "subset", ["test", "val"], "scored on one subset"),
        ("train", "folder", [], "is empty"),
        ("train", "folder", "rgb", "1 folders of features to train on, 2 to test on"),
        ("train", "folder", ["rgb", 3], "expected str, got 3"),
    ],
)
def test_lists_that_mean_nothing_are_refused(tmp_path: Path, part: str, key: str, value: Any, said: str) -> None:
    made = recipe_document(tmp_path)
    made["data"][part][key] = value
    with pytest.raises(TensorkeepError, match=said):
        detection_recipe(made)


def per_file(made: dict[str, Any], *pairs: list[int]) -> dict[str, Any]:
    """The same recipe with a convolution of its own for each file."""
    made["model"]["projection"]["per_file"] = list(pairs)
    return made


def test_each_file_has_a_convolution_of_its_own_and_its_own_place(tmp_path: Path) -> None:
    made = per_file(recipe_document(tmp_path), [5, 10], [3, 6])
    recipe = detection_recipe(made)
    assert check(recipe).lost == 0
    runs.trained(recipe, tmp_path / "run")
    told: list[str] = []
    for part in ("train", "test"):
        made["data"][part]["folder"].reverse()
    with pytest.raises(TensorkeepError, match=r"flow/v2\.npy: its shape is \(24, 3\): neither axis has the 5 channels"):
        check(detection_recipe(made), told.append)
    for number in range(5):
        both = [np.load(tmp_path / name / f"v{number}.npy") for name in ("rgb", "flow")]
        (tmp_path / "all").mkdir(exist_ok=True)
        np.savez(tmp_path / "all" / f"v{number}.npz", np.concatenate(both, 1))
    for part in ("train", "test"):
        made["data"][part]["folder"] = str(tmp_path / "all")
    assert check(detection_recipe(made)).videos == 4
    for part in ("train", "test"):
        made["data"][part]["folder"] = [str(tmp_path / "all")] * 3
    with pytest.raises(TensorkeepError, match=r"3 folders of features, model\.projection\.per_file has 2"):
        check(detection_recipe(made))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (([5, 10], [4, 6]), r"5 \+ 4 of per_file are 9, in_channels is 8"),
        (([5, 10], [3, 7]), r"10 \+ 7 of per_file are 17, channels is 16"),
        (([9, 10], [-1, 6]), "in_channels is 8"),
        (([5, 10, 1],), "per_file"),
    ],
)
def test_widths_that_do_not_add_up_are_refused(tmp_path: Path, pairs: Any, said: str) -> None:
    with pytest.raises(TensorkeepError, match=said):
        detection_recipe(per_file(recipe_document(tmp_path), *pairs))


def test_videos_come_from_one_folder(tmp_path: Path) -> None:
    made = recipe_document(tmp_path)
    made["data"]["inputs"] = "video"
    with pytest.raises(TensorkeepError, match="several folders are for features"):
        detection_recipe(made)


def test_frames_have_no_files_to_project(tmp_path: Path) -> None:
    made = per_file(runs.document(tmp_path), [32, 16])
    with pytest.raises(TensorkeepError, match="per_file is for feature files"):
        detection_recipe(made)
