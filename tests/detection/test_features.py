"""`tensorkeep features`: what a backbone sees, row by row, whole after any interruption."""

import contextlib
import json
import os
import signal
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("av")

from tensorkeep.cli import main
from tensorkeep.detection.data.annotations import parse_annotations
from tensorkeep.detection.data.clips import make_clips
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.readers import FeatureReader, VideoReader, WindowConfig
from tensorkeep.detection.data.windows import count_snippets, make_window, place_windows
from tensorkeep.detection.extraction import side_by_side, write_features
from tensorkeep.detection.inference import Selection
from tensorkeep.detection.model.detector import Detector
from tensorkeep.detection.predict import Predictor
from tensorkeep.detection.start import open_detector
from tensorkeep.errors import TensorkeepError
from tensorkeep.training.recipe import to_yaml
from tests.threads import one_thread  # noqa: F401

from . import runs
from .films import film


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, one short training, and three films, one in a folder below."""
    folder = tmp_path_factory.mktemp("features")
    made = runs.recipe(runs.dataset(folder / "data", 2, 1), training__epochs="1", training__evaluate_every="null")
    made = replace(made, training=replace(made.training, best=None))
    (folder / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
    runs.trained(made, folder / "run")
    (folder / "run" / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
    (folder / "films" / "below").mkdir(parents=True)
    for name, frames in (("a", 57), ("b", 20), ("below/c", 1)):
        film(folder / "films" / f"{name}.mp4", frames)
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    code = main(["features", *map(str, words), "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_rows_are_what_the_detector_sees_and_training_reads_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document, _ = command(capsys, place / "run", place / "films", "-o", tmp_path / "out")
    assert code == 0 and [row["video"] for row in document["videos"]] == ["a", "b", "c"]
    detector = open_detector(place / "run", best=False).detector
    reader = VideoReader(32)
    for row in document["videos"]:
        got = np.load(row["features"])
        frames, window = row["frame"], detector.config.backbone.output_length
        steps = count_snippets(frames, 2)
        assert got.shape == (steps, 32) == (row["steps"], row["channels"]) and got.dtype == np.float32
        truth = parse_annotations({"database": {row["video"]: {"subset": "s", "annotations": []}}})
        [item], _ = find_items(truth, "s", place / "films", reader)
        clips = make_clips([item], WindowConfig("sliding", window, 2, window_overlap_ratio=0.0), reader)
        seen = np.zeros_like(got)
        for index in reversed(range(len(clips))):  # the window before has what two of them show
            sample = clips.sample(index, torch.Generator())
            with torch.no_grad():
                rows = detector.features(sample["inputs"][None])[0].T.numpy()
            first = sample["meta"]["window_start_frame"] // 2
            seen[first : first + len(rows)] = rows[: steps - first]
        assert np.array_equal(got, seen) and np.abs(got).max() > 0
    listed = json.loads((tmp_path / "out" / "features.json").read_text())
    assert listed["videos"]["a"] == {"frame": 57, "duration": 2.85, "steps": 29}
    entry = {"subset": "s", "annotations": [{"segment": [0.5, 1.5], "label": "x"}], **listed["videos"]["a"]}
    [item], problems = find_items(
        parse_annotations({"database": {"a": entry}}), "s", tmp_path / "out", FeatureReader(32), pattern="{video}.mp4"
    )
    assert problems == [] and item.steps == 29
    sample = make_clips([item], WindowConfig(window_size=32, feature_stride=2, crop_ratio=None), FeatureReader(32))
    found = sample.sample(0, torch.Generator())
    assert torch.equal(found["inputs"][:, :29].T, torch.from_numpy(np.load(tmp_path / "out" / "a.npy")))
    assert found["segments"].tolist() == [[5.0, 15.0]]


def test_a_killed_command_leaves_whole_arrays_and_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["features", place / "run", place / "films", "-o", tmp_path / "out", "--device", "cpu", "--quiet"]
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        stream = Predictor.stream

        def dying(self: Predictor, film: Any, problems: list) -> Any:
            for frames in stream(self, film, problems):
                yield frames
                if film.name == "b":
                    os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            monkeypatch.setattr(Predictor, "stream", dying)
            main([str(word) for word in words])
        os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["a.npy", "features.json"]
    before = (tmp_path / "out" / "a.npy").stat().st_mtime_ns
    code, document, err = command(capsys, *words[1:5])
    assert code == 0 and [row["new"] for row in document["videos"]] == [False, True, True]
    assert (tmp_path / "out" / "a.npy").stat().st_mtime_ns == before and "there already" in err
    names = ["a.npy", "b.npy", "c.npy", "features.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    assert command(capsys, *words[1:4], tmp_path / "other")[0] == 0
    assert {name: (tmp_path / "other" / name).read_bytes() for name in names} == whole
    os.utime(place / "films" / "b.mp4")  # a video that was written anew is read anew
    os.utime(tmp_path / "out" / "b.npy", (1, 1))
    assert [row["new"] for row in command(capsys, *words[1:5])[1]["videos"]] == [False, True, False]


def test_a_folder_is_of_one_backbone_and_other_files_stay(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (place / "run", place / "films" / "b.mp4", "-o", tmp_path / "out")
    assert command(capsys, *words)[0] == 0
    averaged = (tmp_path / "out" / "b.npy").read_bytes()
    code, _, err = command(capsys, *words, "--no-ema")
    assert code == 2 and "another weights" in err and (tmp_path / "out" / "b.npy").read_bytes() == averaged
    assert command(capsys, *words, "--no-ema", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "b.npy").read_bytes() != averaged
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "b.npy").write_bytes(b"my own")
    for more in ((), ("--overwrite",)):
        code, _, err = command(capsys, *words[:3], tmp_path / "new", *more)
        assert code == 2 and (tmp_path / "new" / "b.npy").read_bytes() == b"my own", err
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.npy"]


def test_what_cannot_be_read_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    code, document, err = command(
        capsys, place / "run", tmp_path / "broken.mp4", place / "films" / "b.mp4", "-o", tmp_path / "out"
    )
    assert code == 1 and [row["video"] for row in document["videos"]] == ["b"] and "left out" in err
    assert document["broken"][0]["path"].endswith("broken.mp4")
    assert command(capsys, place / "run", tmp_path / "broken.mp4", "-o", tmp_path / "two")[0] == 2
    code, _, err = command(
        capsys, place / "run", tmp_path / "broken.mp4", place / "films", "-o", tmp_path / "four", "--broken", "fatal"
    )
    assert code == 2 and "broken.mp4" in err and not list((tmp_path / "four").glob("*.npy"))
    code, _, err = command(capsys, place / "recipe.yaml", place / "films", "-o", tmp_path / "three")
    assert code == 2 and "would be random" in err and not (tmp_path / "three").exists()
    assert command(capsys, place / "run", "https://host/a.mp4", "-o", tmp_path / "three")[0] == 2
    assert command(capsys, place / "run", "-o", tmp_path / "three")[0] == 2


def test_a_recipe_gives_the_features_of_its_pretrained_weights(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs.recipe(place / "data")
    plain = replace(made.model, backbone=replace(made.model.backbone, adapter=None, tuning="all"))
    backbone = Detector(plain).eval()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.backbone.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "vit.safetensors")
    given = replace(made, training=replace(made.training, pretrained=str(tmp_path / "vit.safetensors")))
    (tmp_path / "recipe.yaml").write_text(to_yaml(given), encoding="utf-8")
    code, document, _ = command(capsys, tmp_path / "recipe.yaml", place / "films" / "b.mp4", "-o", tmp_path / "out")
    assert code == 0 and document["step"] is None
    truth = parse_annotations({"database": {"b": {"subset": "s", "annotations": []}}})
    [item], _ = find_items(truth, "s", place / "films", VideoReader(32))
    clips = make_clips([item], WindowConfig("sliding", 16, 2), VideoReader(32))
    with torch.no_grad():
        seen = backbone.features(clips.sample(0, torch.Generator())["inputs"][None])[0].T
    assert np.allclose(np.load(tmp_path / "out" / "b.npy"), seen[:10].numpy(), atol=1e-6)


def test_memory_does_not_grow_with_the_video(place: Path, tmp_path: Path) -> None:
    path = film(tmp_path / "long.mp4", 900, rate=25)
    detector = open_detector(place / "run", best=False).detector
    window = WindowConfig("sliding", 16, 2)
    predictor = side_by_side(Predictor(detector, (), window, VideoReader(32), Selection()))
    looked_at = predictor.open(path)
    tracemalloc.start()
    written = write_features(predictor, looked_at, tmp_path / "long.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.steps == 450 and len(looked_at.windows) == 29
    assert peak < 8 * (16 * 32 * 43 * 3) + 400_000  # a few windows of pictures; the video is 29 of them


def test_features_that_are_no_numbers_are_an_error(place: Path, tmp_path: Path) -> None:
    detector = open_detector(place / "run", best=False).detector
    with torch.no_grad():
        next(detector.backbone.parameters()).fill_(float("nan"))
    predictor = Predictor(detector, (), WindowConfig("sliding", 16, 2), VideoReader(32), Selection())
    with pytest.raises(TensorkeepError, match="not finite"):
        write_features(predictor, predictor.open(place / "films" / "b.mp4"), tmp_path / "b.npy")
    assert list(tmp_path.iterdir()) == []


def test_windows_side_by_side_cover_every_step_once_or_end_with_the_video() -> None:
    for steps in range(1, 60):
        bounds = place_windows(steps, 16, 0.0)
        windows = [make_window(b, steps * 2, size=16, snippet_stride=2) for b in bounds]
        assert windows[-1].last == steps - 1 and all(w.first == 16 * k for k, w in enumerate(windows[:-1]))
