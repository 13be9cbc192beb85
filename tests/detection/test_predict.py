import json
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

av = pytest.importorskip("av")

from tensorkeep.cli import main  # noqa: E402
from tensorkeep.detection.data.clips import make_clips  # noqa: E402
from tensorkeep.detection.data.containers import frame_table, probe, shown_times  # noqa: E402
from tensorkeep.detection.data.item import Item  # noqa: E402
from tensorkeep.detection.data.readers import VideoReader, WindowConfig  # noqa: E402
from tensorkeep.detection.data.synthetic import write_video  # noqa: E402
from tensorkeep.detection.inference import Selection, detect  # noqa: E402
from tensorkeep.detection.model.head import Predictions  # noqa: E402
from tensorkeep.detection.predict import (  # noqa: E402
    UNNAMED,
    Predictor,
    write_predictions,
)
from tensorkeep.detection.results.classifiers import VideoClasses  # noqa: E402
from tensorkeep.detection.results.nms import Suppression  # noqa: E402
from tensorkeep.detection.results.results import read_detections  # noqa: E402
from tensorkeep.detection.results.subtitles import NamedDetection  # noqa: E402
from tensorkeep.detection.results.timeline import STRIP  # noqa: E402
from tensorkeep.detection.start import open_detector  # noqa: E402
from tensorkeep.training.recipe import to_yaml  # noqa: E402
from tests.opentad_names import to_opentad  # noqa: E402

from . import runs  # noqa: E402
from .films import film  # noqa: E402
from .tiny import detector  # noqa: E402

FRAMES, BRIGHT = 60, ((9, 17, 0), (28, 41, 1))  # frames of each action and its class: light above, or below


class Light(nn.Module):
    """Finds what is light: a run of light grid steps is an action, of class 0 above the middle and of class 1 below.

    Sure of it where it sees both of its ends.
    """

    def forward(self, inputs: Tensor, mask: Tensor) -> Predictions:
        batch, length = mask.shape
        logits, offsets = torch.full((batch, 2, length), -20.0), torch.zeros(batch, 2, length)
        half = inputs.shape[3] // 2
        for row in range(batch):
            for label, part in ((0, inputs[row, :, :, :half]), (1, inputs[row, :, :, half:])):
                light = (part.float().mean((0, 2, 3)) > 128) & mask[row]
                edges = np.flatnonzero(np.diff(np.concatenate([[0], light.int().numpy(), [0]])))
                for start, stop in edges.reshape(-1, 2).tolist():
                    whole = start > 0 and stop < int(mask[row].sum())
                    logits[row, label, start] = 3.0 if whole else -2.0
                    offsets[row, :, start] = torch.tensor([0.0, stop - start])
        points = torch.stack([torch.arange(length), *[torch.zeros(length)] * 2, torch.ones(length)], 1).float()
        return Predictions([logits], [offsets], [mask], (points,))


def pictures(height: int = 50, width: int = 66, frames: int = FRAMES) -> list[np.ndarray]:
    made = np.full((frames, height, width, 3), 20, np.uint8)
    for start, stop, label in BRIGHT:
        made[start:stop, height // 2 :] = 230 if label else 20
        made[start:stop, : height // 2] = 20 if label else 230
    return list(made)


def watcher(**changes: Any) -> Predictor:
    fields: dict[str, Any] = {
        "detector": Light(),
        "classes": ("above", "below"),
        "reader": VideoReader(24),
        "window": WindowConfig("sliding", window_size=32, feature_stride=1),
        "selection": Selection(nms=Suppression(sigma=0.1, min_score=0.2)),
    }
    return Predictor(**{**fields, **changes})


def vary(mean: int) -> list[int]:
    """Times in ms of frames whose distance changes in the middle, by a factor of eight, and jitters."""
    gaps = np.where(np.arange(FRAMES) < 25, mean // 4, mean * 2) + np.arange(FRAMES) % 7
    return (np.cumsum(gaps) - gaps[0]).tolist()


KINDS: dict[str, dict[str, Any]] = {
    "even.mp4": {"fps": 25},
    "ntsc.mp4": {"fps": Fraction(30000, 1001)},
    "ntsc.mkv": {"fps": Fraction(30000, 1001)},
    "slow.avi": {"fps": 7, "codec": "mpeg4", "max_b_frames": 0},
    "varying.mp4": {"fps": 10, "times": vary(100)},
    "varying.mkv": {"fps": 10, "times": vary(100)},
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_an_action_begins_and_ends_when_a_player_shows_it(kind: str, stride: int, tmp_path: Path) -> None:
    path, how = tmp_path / kind, dict(KINDS[kind])
    fps = how.pop("fps")
    write_video(path, pictures(), fps, **how)
    with av.open(str(path)) as container:  # what a player goes by
        shown = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    predictor = watcher(window=WindowConfig("sliding", window_size=32 // stride, feature_stride=stride))
    rows = sorted(predictor.run(predictor.open(path)).rows)
    found = [(row.start, row.end, row.label) for row in rows if row.score > 0.9]
    # seen through every second frame, an action begins with the first such frame in it
    wanted = [
        (
            shown[-(-start // stride) * stride] - shown[0],
            shown[-(-stop // stride) * stride] - shown[0],
            ("above", "below")[label],
        )
        for start, stop, label in BRIGHT
    ]
    assert [label for *_, label in found] == [label for *_, label in wanted]
    assert np.abs(np.array([f[:2] for f in found]) - np.array([w[:2] for w in wanted])).max() < 0.002


def test_only_uneven_frames_have_times_of_their_own(tmp_path: Path) -> None:
    for kind, how in KINDS.items():
        options = dict(how)
        write_video(tmp_path / kind, pictures(), options.pop("fps"), **options)
        times = shown_times(frame_table(tmp_path / kind), probe(tmp_path / kind))
        assert (times is not None) == kind.startswith("varying"), kind
        assert times is None or (len(times) == FRAMES + 1 and (np.diff(times) > 0).all())


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("size", [(50, 66), (66, 50)])
def test_a_turned_video_is_seen_as_it_is_meant(degrees: int, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = size if degrees == 180 else size[::-1]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)
        back = -_turn_of(tmp_path, degrees) // 90
        for pixels in pictures(*size):
            stored = np.ascontiguousarray(np.rot90(pixels, back))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, "rgb24")))
        container.mux(stream.encode(None))
    info = probe(path)
    assert (info.height, info.width) == size
    predictor = watcher()
    rows = sorted(row for row in predictor.run(predictor.open(path)).rows if row.score > 0.9)
    assert [row.label for row in rows] == ["above", "below"]


def _turn_of(folder: Path, degrees: int) -> int:
    """Which way the encoder's rotation turns, counterclockwise: FFmpeg has changed its mind about the sign."""
    path = folder / f"way{degrees}.mp4"
    if not path.exists():
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            stream.set_display_rotation(degrees)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
            container.mux(stream.encode(None))
    return probe(path).rotation


@pytest.mark.parametrize("size", [(51, 67), (37, 200), (24, 24)])
def test_odd_sizes_are_read(size: tuple[int, int], tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", pictures(*size), 25)
    predictor = watcher()
    assert sorted(row.label for row in predictor.run(predictor.open(tmp_path / "odd.mp4")).rows if row.score > 0.9) == [
        "above",
        "below",
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("method", ["sliding", "resize"])
@pytest.mark.parametrize("frames", [1, 5, 61])
def test_streaming_finds_bitwise_what_an_evaluation_finds(
    frames: int, method: Any, threads: int, batch: int, tmp_path: Path
) -> None:
    model, path = detector().eval(), tmp_path / "v.mp4"
    rng = np.random.default_rng(0)
    write_video(path, rng.integers(0, 255, (frames, 40, 56, 3), dtype=np.uint8), 10, gop_size=7)
    info, config = probe(path), WindowConfig(method, window_size=8, feature_stride=2)
    selection = Selection(threshold=0.0, nms=Suppression(limit=500))
    nothing = np.zeros((0, 2)), np.zeros(0, np.int64)
    item = Item("v", str(path), info.frames, info.duration, path.stat().st_size, 0, *nothing)
    clips = make_clips([item], config, VideoReader(32))
    [(_, expected)] = detect(model, clips, selection, batch=batch)
    predictor = Predictor(model, ("a", "b", "c"), config, VideoReader(32, threads=threads), selection, batch=batch)
    seen: list[int] = []
    rows = predictor.run(predictor.open(path), progress=seen.append).rows
    assert len(seen) == len(clips) and len(rows) == len(expected.scores) > 0
    order = np.argsort(-expected.scores, kind="stable")
    assert [row[:2] for row in rows] == [tuple(pair) for pair in expected.segments[order].astype(float).tolist()]
    assert [row.score for row in rows] == expected.scores[order].tolist()
    assert [row.label for row in rows] == ["abc"[label] for label in expected.labels[order]]


def test_memory_holds_a_few_windows_of_a_long_video(tmp_path: Path) -> None:
    side, steps, frames = 80, 64, 2040
    write_video(tmp_path / "long.mp4", (p for _ in range(frames // FRAMES) for p in pictures(side, side)), 25)
    predictor = watcher(window=WindowConfig("sliding", window_size=steps, feature_stride=1), reader=VideoReader(side))
    film = predictor.open(tmp_path / "long.mp4")
    tracemalloc.start()  # numpy's memory and Python's: the pictures are numpy's
    rows = predictor.run(film, [1.0, 5.0]).rows
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # two that share half their pictures, their copies, the one being decoded; the video is 32 of them
    assert rows and peak < 6 * (steps * side * side * 3)


def test_thumbnails_are_of_their_seconds(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", pictures(), 25)
    predictor = watcher(window=WindowConfig("sliding", window_size=32, feature_stride=2))
    made = predictor.run(predictor.open(tmp_path / "v.mp4"), [0.5, 1.38, 99.0]).pictures
    assert [seconds for seconds, _ in made] == pytest.approx([12 / 25, 34 / 25, 58 / 25], abs=0.021)
    for (_, data), (above, below) in zip(made, ((True, False), (False, True), (False, False))):
        decoded = av.CodecContext.create("mjpeg", "r").decode(av.Packet(data))
        pixels = decoded[0].to_ndarray(format="rgb24")
        assert len(pixels) == STRIP
        assert ((pixels[: STRIP // 3].mean() > 128), (pixels[-STRIP // 3 :].mean() > 128)) == (above, below)


class Unnamed(Light):
    """As `Light`, of one class."""

    def forward(self, inputs: Tensor, mask: Tensor) -> Predictions:
        made = super().forward(inputs, mask)
        return made._replace(logits=[made.logits[0].amax(1, keepdim=True)])


@pytest.mark.parametrize(("name", "label"), [("known", "y"), ("own", UNNAMED)])
def test_a_class_agnostic_detection_has_a_name_where_the_classifier_knows_the_video(
    name: str, label: str, tmp_path: Path
) -> None:
    knows = VideoClasses(("x", "y"), {"known": np.array([0.25, 0.75])})
    write_video(tmp_path / f"{name}.mp4", pictures(), 25)
    selection = Selection(nms=Suppression(sigma=0.1), classifier=knows, top=1)
    predictor = watcher(detector=Unnamed(), classes=knows.classes, selection=selection)
    rows = predictor.run(predictor.open(tmp_path / f"{name}.mp4")).rows
    assert rows and {row.label for row in rows} == {label}


def test_the_file_reads_back_to_the_millisecond(tmp_path: Path) -> None:
    rows = [NamedDetection(1.23449, 5.0, "dive", 0.1234567), NamedDetection(0.0, 0.5, "jump", 1e-4)]
    write_predictions(tmp_path / "d.json", {"v": rows, "empty": []}, "a run", pretrained=True)
    table = read_detections(tmp_path / "d.json")
    assert table.video_names == ("v", "empty") and [table.label_names[i] for i in table.labels] == ["dive", "jump"]
    assert table.segments.tolist() == [[1.234, 5.0], [0.0, 0.5]] and table.scores.tolist() == [0.123457, 1e-4]
    document = json.loads((tmp_path / "d.json").read_text())
    assert set(document) == {"version", "results", "external_data"}
    assert document["external_data"] == {"used": True, "details": "a run"}


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `run` (one short training) and a broken and a cut video in `sick`."""
    folder = tmp_path_factory.mktemp("predict")
    data = runs.dataset(folder / "data")
    made = runs.recipe(data)
    (folder / "recipe.yaml").write_text(to_yaml(made), encoding="utf-8")
    assert (
        main(
            [
                "train",
                "detection",
                str(folder / "recipe.yaml"),
                "--out",
                str(folder / "run"),
                "--device",
                "cpu",
                "--quiet",
            ]
        )
        == 0
    )
    (folder / "sick").mkdir()
    whole = (data / "videos" / "training_0001.mp4").read_bytes()
    (folder / "sick" / "broken.mp4").write_bytes(b"no video")
    write_video(folder / "sick" / "cut.mkv", pictures(64, 64), 10)
    sound = (folder / "sick" / "cut.mkv").read_bytes()
    (folder / "sick" / "cut.mkv").write_bytes(sound[: len(sound) * 2 // 3])
    (folder / "sick" / "sound.mp4").write_bytes(whole)
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main(["predict", *map(str, words), "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_one_command_gives_what_the_evaluation_of_the_run_scores(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", "detection", str(place / "run"), "--json", "--device", "cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    held_out = sorted((place / "data" / "videos").glob("validation*"))
    truth = place / "data" / "annotations.json"
    code, document, _ = command(
        capsys,
        place / "run",
        *held_out,
        "-o",
        tmp_path / "out",
        "--annotations",
        truth,
        "--min-score",
        "0.01",
        "--top",
        7,
    )
    assert code == 0 and document["step"] == expected["step"] and document["ema"] is True
    scored = ["--annotations", truth, "--detections", document["detections"], "--tiou", 0.3, 0.5, "--json"]
    assert main(["eval", "detection", *map(str, scored)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["detections"] == expected["detections"] and found["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)
    for video in document["videos"]:
        files = {kind: Path(path).read_text(encoding="utf-8") for kind, path in video["files"].items()}
        assert video["shown"] == 7 and files["html"].count('<rect class="p"') == 7
        assert '<rect class="t"' in files["html"] and files["html"].count("<img ") >= 9
        assert files["vtt"].startswith("WEBVTT") and "-->" in files["srt"]


def test_a_broken_video_is_named_and_left_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = command(capsys, place / "run", place / "sick", "-o", tmp_path / "a")
    assert code == 1
    assert [video["video"] for video in document["videos"]] == ["sound"]
    assert {Path(entry["path"]).name for entry in document["broken"]} == {"broken.mp4", "cut.mkv"}
    assert "left out" in err and "broken.mp4" in err and "cut.mkv" in err and "cut short" in err
    assert read_detections(document["detections"]).video_names == ("sound",)
    code, _, err = command(capsys, place / "run", place / "sick", "-o", tmp_path / "c", "--broken", "fatal")
    assert code == 2 and "broken.mp4" in err and "left out" not in err and not (tmp_path / "c").exists()
    code, document, err = command(capsys, place / "run", place / "sick", "-o", tmp_path / "b", "--broken", "keep")
    assert code == 1 and [video["video"] for video in document["videos"]] == ["cut", "sound"]
    assert "cut short" in document["videos"][0]["problems"][0] and "cut short" in err


def test_equal_names_in_folders_below_are_told_apart(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, end in (("one", ".mp4"), ("two", ".MP4")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / f"clip{end}").write_bytes((place / "sick" / "sound.mp4").read_bytes())
    code, document, _ = command(capsys, place / "run", tmp_path / "in", "-o", tmp_path / "out")
    assert code == 0 and [video["video"] for video in document["videos"]] == ["one/clip", "two/clip"]
    assert read_detections(document["detections"]).video_names == ("one/clip", "two/clip")
    for folder in ("one", "two"):
        assert sorted(p.name for p in (tmp_path / "out" / folder).iterdir()) == ["clip.html", "clip.srt", "clip.vtt"]


def test_recordings_that_were_joined_are_kept_on_request_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = film(tmp_path / "one.ts", codec="libx264").read_bytes()
    (tmp_path / "joined.ts").write_bytes(one + one)
    words = (place / "run", tmp_path / "joined.ts", "-o", tmp_path / "out")
    code, document, err = command(capsys, *words)
    assert code == 2 and "left out" in err and "clock starts again at frame 40 (2.00 s)" in err
    code, document, err = command(capsys, *words, "--broken", "keep")
    assert code == 0 and document["videos"][0]["frames"] == 80 and document["videos"][0]["seconds"] == 4.0
    assert document["videos"][0]["problems"][0].startswith("kept: its clock starts again") and "kept: " in err
    code, document, err = command(capsys, place / "run", "https://me:s3cret@host:9/a/match.mp4", "-o", tmp_path / "out")
    assert (
        code == 2 and "https://" in err and "host:9/a/match.mp4" in err and "s3cret" not in err + json.dumps(document)
    )


def test_all_broken_is_an_error(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for paths in ([place / "sick" / "broken.mp4"], [place / "sick" / "broken.mp4", place / "gone.mp4"]):
        code, document, err = command(capsys, place / "run", *paths, "-o", tmp_path)
        assert code == 2 and "could be read" in err.replace("could not be read", "could be read")
        assert "error" in document and not list(tmp_path.iterdir())
    assert "gone.mp4" in err


def test_what_stands_in_the_folder_stays(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = place / "sick" / "sound.mp4"
    (tmp_path / "sound.srt").write_text("mine")
    code, _, err = command(capsys, place / "run", video, "-o", tmp_path)
    assert code == 2 and "exists already" in err and [p.name for p in tmp_path.iterdir()] == ["sound.srt"]
    code, _, err = command(capsys, place / "run", video, "-o", tmp_path, "--overwrite")  # no predictions: they stay too
    assert code == 2 and "sound.srt" in err and (tmp_path / "sound.srt").read_text() == "mine"
    (tmp_path / "sound.srt").unlink()
    assert command(capsys, place / "run", video, "-o", tmp_path)[0] == 0
    (tmp_path / "detections.json").write_text('{"results": {}}')
    assert command(capsys, place / "run", video, "-o", tmp_path)[0] == 2
    assert command(capsys, place / "run", video, "-o", tmp_path, "--overwrite")[0] == 0
    assert "sound" in (tmp_path / "detections.json").read_text()


def test_an_interruption_keeps_what_is_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out, whole, calls = sorted((place / "data" / "videos").glob("validation*")), Predictor.run, []

    def run(self: Predictor, *words: Any, **named: Any) -> Any:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, *words, **named)

    monkeypatch.setattr(Predictor, "run", run)
    words = ["predict", place / "run", *held_out, "-o", tmp_path, "--device", "cpu"]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        sys.exit(main([str(word) for word in words]))
    assert stopped.value.args == (130,)
    assert read_detections(tmp_path / "detections.json").video_names == (held_out[0].stem,)
    assert "lacks 2 of 3 videos" in capsys.readouterr().err


def test_a_step_folder_and_live_weights_can_be_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, step = place / "sick" / "sound.mp4", place / "run" / "checkpoints" / "step-000004"
    _, averaged, _ = command(capsys, step, video, "-o", tmp_path / "a")
    _, live, _ = command(capsys, step, video, "-o", tmp_path / "b", "--no-ema")
    assert (averaged["step"], averaged["ema"], live["step"], live["ema"]) == (4, True, 4, False)
    assert Path(averaged["detections"]).read_bytes() != Path(live["detections"]).read_bytes()


def test_an_opentad_checkpoint_with_its_recipe_gives_what_the_run_gives(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_detector(place / "run")
    state = {f"module.{name}": tensor for name, tensor in to_opentad(opened.detector).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pth")
    recipe = to_yaml(runs.recipe(place / "data", data__class_map=json.dumps("gone.txt")))
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    video = place / "sick" / "sound.mp4"
    words = (tmp_path / "epoch_3.pth", video, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "theirs")
    code, _, err = command(capsys, *words)
    assert code == 2 and "--classes" in err
    assert command(capsys, *words, "--classes", place / "data" / "category_idx.txt")[0] == 0
    assert command(capsys, place / "run", video, "-o", tmp_path / "ours")[0] == 0
    theirs, ours = (read_detections(tmp_path / name / "detections.json") for name in ("theirs", "ours"))
    assert theirs.label_names == ours.label_names and np.array_equal(theirs.segments, ours.segments)
    assert np.array_equal(theirs.scores, ours.scores)


def test_wrong_words_are_told_before_work(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, place / "run")[0] == 2
    assert command(capsys, place / "run", place / "data" / "annotations.json", "-o", tmp_path)[0] == 2
    assert command(capsys, place / "run", place / "sick" / "sound.mp4", "-o", tmp_path, "--top", 0)[0] == 2
    code, _, err = command(capsys, place / "sick" / "sound.mp4", place / "sick" / "sound.mp4", "-o", tmp_path)
    assert code == 2 and "--recipe" in err


def test_a_name_of_two_lines_is_said_in_one(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a\nerror: b.mp4").write_bytes((place / "sick" / "sound.mp4").read_bytes())
    words = ["predict", place / "run", tmp_path / "a\nerror: b.mp4", "-o", tmp_path / "out", "--device", "cpu"]
    assert main([*map(str, words), "--min-score", "1"]) == 0
    said = capsys.readouterr()
    assert "\nerror:" not in said.out + said.err and said.out.endswith("a\\nerror: b.html\n")
