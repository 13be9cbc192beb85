"""A folder of kept frames: what is taken for one, what `check` says of it, and what a frame is known by."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tensorkeep.cli import main
from tensorkeep.detection.data import frame_cache
from tensorkeep.detection.data.frame_cache import MARKER, Grid, cached_frames, describe, find_cache, open_cache
from tensorkeep.detection.data.problems import Problem
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError
from tests.detection import runs

from .films import film

SIDE, FRAMES = 24, 60
GRID = Grid(np.arange(0, FRAMES, 2), "every 2 of 60")


def frames_of(path: Path, folder: Path) -> tuple[torch.Tensor, int]:
    """The frames of a grid by way of a folder, and how many were decoded."""
    asked = 0

    def fetch(numbers: Any, odd: list[Problem], stored: set[tuple[int, int]]) -> torch.Tensor:
        nonlocal asked
        asked += len(numbers)
        return decode(path, numbers, size=SIDE, problems=odd, stored=stored)

    return cached_frames(open_cache(folder, 1), str(path), GRID, GRID.frames, SIDE, fetch, []), asked


def raw_film(path: Path, middle: int) -> Path:
    """Pictures that are not compressed, of the same length, time and ends whatever the `middle` ones show."""
    drawn, other = np.random.default_rng(0), np.random.default_rng(middle)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b"YUV4MPEG2 W64 H48 F10:1 Ip A1:1 C420jpeg\n")
        for number in range(FRAMES):
            picture = drawn.integers(0, 256, 64 * 48 * 3 // 2)
            shown = other.integers(0, 256, len(picture)) if 25 <= number < 35 else picture
            file.write(b"FRAME\n" + shown.astype(np.uint8).tobytes())
    os.utime(path, (1e9, 1e9))
    return path


def test_raw_videos_of_one_name_size_and_time_that_differ_between_their_ends_are_two(tmp_path: Path) -> None:
    for middle in (1, 2):
        path = raw_film(tmp_path / f"camera{middle}" / "a.y4m", middle)
        found, decoded = frames_of(path, tmp_path / "cache")
        assert decoded == len(GRID.frames) and torch.equal(found, decode(path, GRID.frames, size=SIDE))
    assert len(list((tmp_path / "cache").glob("*.frames"))) == 2


def test_a_folder_that_was_emptied_while_a_run_filled_it_is_still_ours(tmp_path: Path) -> None:
    path, folder = film(tmp_path / "a.mp4", FRAMES), tmp_path / "cache"
    frames_of(path, folder)
    (folder / MARKER).unlink()
    assert frames_of(path, folder)[1] == 0 and (folder / MARKER).is_file()
    (folder / "notes.txt").write_text("mine")
    assert frames_of(path, folder)[1] == 0  # beside a marker nothing disturbs
    (folder / MARKER).unlink()
    with pytest.raises(TensorkeepError, match="holds no decoded frames"):
        open_cache(folder, 1)


def test_the_home_folder_is_meant_where_a_recipe_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_cache("~/frames", 1).folder == find_cache("~/frames", 1).folder == tmp_path / "frames"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames"]


def test_finding_a_folder_makes_nothing(tmp_path: Path) -> None:
    kept = find_cache(tmp_path / "new", 1)
    assert describe(kept, []).startswith("0% of 0 frames") and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    runs.dataset(folder, videos=2, held_out=1)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(runs.document(folder)))
    return folder / "recipe.yaml"


def a_file(place: Path) -> None:
    place.write_text("x")


def a_folder_of_others(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("x")


def a_folder_of_another_version(place: Path) -> None:
    place.mkdir()
    (place / MARKER).write_text(json.dumps({"tensorkeep frames": 99}))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (a_file, "is not a folder"),
        (a_folder_of_others, "is not empty and holds no decoded frames"),
        (a_folder_of_another_version, "holds frames of another version"),
    ],
)
def test_check_refuses_a_folder_that_training_would_refuse(
    make: Any, what: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "place")
    assert main(["check", "detection", str(recipe), "--data.cache", str(tmp_path / "place")]) == 2
    assert what in capsys.readouterr().err


def test_check_says_where_frames_will_find_no_room(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", "detection", str(recipe), "--data.cache", str(tmp_path / "new"), "--data.cache_gib"]
    for gib, said in (("0.0001", True), ("1", False)):
        main([*command, gib])
        assert ("MiB, the others are decoded each time" in capsys.readouterr().out) is said
    assert not (tmp_path / "new").exists()


def test_what_the_disk_has_counts_before_frames_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "a.mp4", FRAMES)
    monkeypatch.setattr(frame_cache, "_free", lambda folder: frame_cache._SPARE - 1)
    for kept in (find_cache(tmp_path / "a" / "new", 100), open_cache(tmp_path / "made", 100)):
        said = describe(kept, [(str(path), GRID, SIDE)])
        assert re.search(r"; there is room for 0(\.00391)? MiB, the others are decoded each time$", said), said
    assert not kept.room(1 << 20) and "free, of which" in kept.stopped


class OldPyAV:
    __version__ = "15.0.0"
    stream = object()


@pytest.mark.parametrize("command", ["check", "train"])
def test_an_old_pyav_is_said_once_and_not_taken_for_broken_videos(
    command: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", OldPyAV)
    more = ["--out", str(tmp_path / "run")] if command == "train" else []
    assert main([command, "detection", str(recipe), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("needs PyAV 17.1 or newer: found 15.0.0") == 1 and "left out" not in said
    assert "hint: pip install 'tensorkeep[detection]'" in said
