"""What cannot teach anything is told before the first update; right data is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.cli import main
from tensorkeep.detection.check import LOST, check_training, refuse_untrainable
from tensorkeep.detection.data.annotations import Annotations, Video
from tensorkeep.detection.data.clips import Clips, FeatureReader, VideoReader, WindowConfig, make_clips
from tensorkeep.detection.data.item import Item
from tensorkeep.detection.model.assignment import assign_targets, make_points
from tensorkeep.detection.model.config import HeadConfig
from tensorkeep.errors import TensorkeepError
from tensorkeep.training._logbook import NOTHING, Log, Update
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Loop
from tests.detection import runs

HEAD = HeadConfig(classes=2, strides=(1, 2, 4), ranges=((0, 4), (4, 8), (8, 10000)))
WINDOW = WindowConfig(window_size=16, feature_stride=4)


def data(rows: list[list[float]], frames: int = 400, rate: float = 25, window: WindowConfig = WINDOW) -> Any:
    """Clips of one video, and annotations that agree with them."""
    segments = np.array(rows, dtype=np.float64).reshape(-1, 2)
    item = Item("v", "v.mp4", frames, frames / rate, 1, 0, segments, np.zeros(len(rows), dtype=np.int64))
    video = Video("v", "training", segments, ("a",) * len(rows), frames / rate, frames)
    return make_clips([item], window, VideoReader()), Annotations({"v": video}, ("a", "b"), "opentad", "gt.json")


def checked(rows: list[list[float]], **more: Any) -> Any:
    clips, annotations = data(rows, **more)
    return check_training(clips, annotations, ("training",), ("a", "b"), HEAD)


def learns(clips: Clips, start: float, end: float) -> bool:
    """Whether some window of the video teaches a point: all windows, written out."""
    steps, size = clips.items[0].frames // 4, clips.window.window_size
    points = torch.cat(make_points((size, size // 2, size // 4), HEAD.strides, HEAD.ranges))
    for first in range(max(steps - size, 0) + 1):
        low, high = max(start, first), min(end, first + size)
        if end > start and (high - low) / (end - start) >= clips.window.trunc_thresh:
            segment = torch.tensor([[low - first, high - first]])
            if assign_targets(points, segment, torch.tensor([0]), 1)[0].any():
                return True
    return False


@given(st.floats(-1, 17), st.floats(-0.5, 6))
@settings(deadline=None, max_examples=150)
def test_an_action_is_lost_exactly_where_no_window_teaches_it(start: float, length: float) -> None:
    clips, annotations = data([[start, start + length]])
    found = check_training(clips, annotations, ("training",), ("a", "b"), HEAD)
    grid = np.trunc(np.array([start, start + length]) / 16.0 * 400) / 4
    assert (found.lost == 0) == learns(clips, *grid.tolist())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[25, 75], [100, 150]], "look like frames: divide by the frame rate"),
        ([[5000, 7000], [9000, 9900]], "look like milliseconds: divide by 1000"),
        ([[3, 2]], "its end comes before its start"),
        ([[1.0, 1.05]], "it lasts 0.05 s, one step of the grid is 0.16 s"),
        ([[1, 9]], "it lasts 50 steps of the grid, a window has 16"),
        ([[15, 40]], "it ends at 40 s, the video at 16.00 s"),
    ],
)
def test_why_nothing_can_be_learned_is_said_and_the_run_is_refused(rows: list[list[float]], said: str) -> None:
    found = checked(rows)
    assert found.lost == found.actions == len(rows)
    lost = [problem for problem in found.problems if problem.kind == LOST]
    assert len(lost) == 1 and said in lost[0].message and lost[0] == found.problems[0]
    with pytest.raises(TensorkeepError, match=f"none of the {len(rows)} actions can be learned; v: "):
        refuse_untrainable(found, "gt.json")


def test_a_part_that_cannot_be_learned_is_told_and_the_rest_trains() -> None:
    found = checked([[1, 2], [3, 3.02], [4, 5]])
    assert (found.lost, found.actions) == (1, 3) and "1 of 3 actions cannot be learned" in found.problems[0].message
    refuse_untrainable(found, "gt.json")


def test_right_annotations_have_no_finding_and_their_points_are_expected() -> None:
    found = checked([[1, 2], [3, 4.5]])
    assert (found.problems, found.lost) == ((), 0) and found.levels[0] > 0 and len(found.levels) == 3


@pytest.mark.parametrize(("steps", "odd"), [(100, False), (96, False), (50, True), (200, True), (12, True)])
def test_rows_of_features_are_compared_with_the_frames(steps: int, odd: bool) -> None:
    segments, labels = np.array([[1.0, 2.0]]), np.zeros(1, dtype=np.int64)
    item = Item("v", "v.npy", 400, 16.0, 1, steps, segments, labels)
    clips = make_clips([item], WINDOW, FeatureReader(8))
    found = check_training(clips, data([[1, 2]])[1], ("training",), ("a", "b"), HEAD)
    assert any("rows of features at 4 frames each" in p.message for p in found.problems) == odd


def test_the_command_lists_findings_and_what_an_epoch_teaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = runs.dataset(tmp_path / "data", videos=3, held_out=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(runs.document(place)))
    assert main(["check", "detection", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["actions_that_nothing_can_learn"], found["problems"], found["files"]) == (0, [], [])
    assert len(found["expected_positives"]) == 2 and min(found["expected_positives"]) > 0
    truth = json.loads((place / "annotations.json").read_text())
    name, first = next((n, v) for n, v in truth["database"].items() if v["subset"] == "training")
    first["annotations"][0]["segment"] = first["annotations"][0]["segment"][::-1]
    (place / "annotations.json").write_text(json.dumps(truth))
    assert main(["check", "detection", str(recipe)]) == 1
    out = capsys.readouterr().out
    assert (
        f"{name}: 1 of " in out and "its end comes before its start" in out and "points that learn in an epoch" in out
    )
    for video in truth["database"].values():
        for row in video["annotations"]:
            row["segment"] = [8 * t + 100 for t in row["segment"]]
    (place / "annotations.json").write_text(json.dumps(truth))
    assert main(["train", "detection", str(recipe), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "actions can be learned" in said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_label_is_a_finding_beside_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = runs.dataset(tmp_path / "data", videos=2, held_out=1)
    truth = json.loads((place / "annotations.json").read_text())
    video = next(v for v in truth["database"].values() if v["subset"] == "training")
    video["annotations"][0] |= {"label": "zzz", "segment": [3, 2]}
    (place / "annotations.json").write_text(json.dumps(truth))
    (tmp_path / "recipe.yaml").write_text(json.dumps(runs.document(place)))
    (tmp_path / "classes.txt").write_text("blink\nslide\n")
    words = ["check", "detection", str(tmp_path / "recipe.yaml"), "--data.class_map", str(tmp_path / "classes.txt")]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "'zzz'" in out and "ends before it starts" in out and "not looked at before the labels fit" in out


def test_a_short_file_is_not_taken_for_another_unit() -> None:
    clips, annotations = data([[1, 2]], frames=3, rate=10)
    video = annotations.videos["v"]
    longer = Annotations(
        {"v": Video("v", "training", video.segments, ("a",), 6.0, 60)}, ("a", "b"), "opentad", "gt.json"
    )
    found = check_training(clips, longer, ("training",), ("a", "b"), HEAD)
    assert found.lost == 1 and "look like" not in found.problems[0].message


def test_a_loss_of_exactly_0_stops_the_run(tmp_path: Path) -> None:
    class Silent:
        trackers: tuple[Any, ...] = ()
        pace = ("samples", 1.0)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)

    from tensorkeep.output import Output

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loop = Loop(updates=100, batch=1, log_every=1)
    log = Log(tmp_path, Silent(), loop, World(), scaler, Output(quiet=True))  # type: ignore[arg-type]
    nothing = Update({"loss": torch.tensor(0.0)}, torch.tensor(0.0), 1.0)
    for step in range(1, NOTHING + 1):
        log.note(step, step, nothing)
    log.note(NOTHING + 1, 1, Update({"loss": torch.tensor(1e-30)}, torch.tensor(0.0), 1.0))
    for step in range(30, 30 + NOTHING):
        log.note(step, step, nothing)
    with pytest.raises(TensorkeepError, match="exactly 0 from update 30 to 50"):
        log.note(50, 50, nothing)
