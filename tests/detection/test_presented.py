"""Frames and times are those of the pictures that a player shows, whatever header and container say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import av

from tensorkeep.detection.data.annotations import parse_annotations
from tensorkeep.detection.data.clips import make_clips
from tensorkeep.detection.data.containers import frame_table, probe, shown_times
from tensorkeep.detection.data.item import frame_lengths, frame_positions, resized_positions, seconds_shown
from tensorkeep.detection.data.items import find_items
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.problems import Told
from tensorkeep.detection.data.readers import VideoReader, WindowConfig
from tensorkeep.detection.data.video import decode
from tensorkeep.detection.data.video_checks import check_video
from tensorkeep.detection.data.windows import make_window
from tensorkeep.detection.inference import Selection, detect
from tensorkeep.detection.results.nms import Suppression
from tensorkeep.errors import TensorkeepError

from .films import HEIGHT, WIDTH, copied, film, number_of, picture, presented, torn, without_start

UNEVEN = np.cumsum([0] + [33] * 15 + [200] * 8 + [50] * 16)  # a screen: 30 pictures a second, then 5, then 20


def whole(folder: Path, name: str) -> Path:
    """A file that a player shows from end to end."""
    source = folder / f"source{Path(name).suffix}"
    if name.startswith("cut"):  # hides the pictures before the cut by an edit list, in MP4
        return copied(film(source, sound=2.0), folder / name, 0.45, 1.5)
    if name.startswith("headless"):  # starts with pictures that refer to others that are not there
        codec = "mpeg2video" if name.endswith("ts") else "libx264"
        return without_start(film(source, codec=codec, gop=15), folder / name, 8)
    made = {
        "long_sound.mkv": {"sound": 4.0},
        "long_sound.flv": {"codec": "flv1", "b_frames": 0, "sound": 4.0},
        "late.mkv": {"start": 5.0, "sound": 1.0},
        "late.ts": {"start": 100.0, "codec": "libx264"},
        "late.mp4": {"start": 3.0},
        "disc.mpg": {"codec": "mpeg2video", "form": "mpeg", "rate": 25, "sound": 3.0},
        "screen.mkv": {"times": UNEVEN, "b_frames": 0},
        "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
        "media.wmv": {"codec": "wmv2", "form": "asf", "b_frames": 0},
        "moving.gif": {"codec": "gif", "b_frames": 0, "rate": 10},
    }[name]
    return film(folder / name, **made)  # type: ignore[arg-type]


HEALTHY = [
    "cut.mp4",
    "cut.mov",
    "headless.mkv",
    "headless.ts",
    "long_sound.mkv",
    "long_sound.flv",
    "late.mkv",
    "late.ts",
]
HEALTHY += ["late.ts", "late.mp4", "disc.mpg", "screen.mkv", "fragments.mp4", "media.wmv", "moving.gif"]


@pytest.mark.parametrize("name", HEALTHY)
def test_what_a_player_shows_is_read_at_its_time_and_nothing_is_called_faulty(tmp_path, name):
    path = whole(tmp_path, name)
    seconds, numbers = presented(path)
    assert 10 < len(seconds) <= 40
    info, table = probe(path), frame_table(path)
    assert (info.frames, len(table.pts), info.problem, info.notes) == (len(seconds), len(seconds), None, ())
    times = shown_times(table, info)
    times = np.arange(info.frames) / info.fps if times is None else times[:-1]
    assert np.abs(times - seconds).max() < 0.002
    assert info.duration == pytest.approx(seconds[-1] + np.median(np.diff(seconds)), abs=0.002)
    order = np.random.default_rng(0).permutation(info.frames)
    assert [number_of(frame) for frame in decode(path, order)] == [numbers[i] for i in order]
    assert [p for p in check_pictures(path) if p.kind != "variable frame rate"] == []


def test_an_edited_clip_lacks_pictures_and_a_headless_one_too(tmp_path):
    assert presented(whole(tmp_path, "cut.mp4"))[1][0] == 9  # 0.45 s at 20 a second; the keyframe is picture 0
    path = whole(tmp_path, "headless.ts")
    with av.open(str(path)) as container:
        packets = sum(1 for packet in container.demux(video=0) if packet.size)
    assert presented(path)[1][0] == 15 and len(frame_table(path).pts) == 25 < packets == 32


def test_labels_lie_on_the_frames_shown_at_their_seconds(tmp_path):
    path = film(tmp_path / "screen.mp4", times=UNEVEN, b_frames=0)
    seconds, _ = presented(path)
    actions = np.array([[0.1, 0.4], [0.9, 1.7], [2.2, 2.75]])
    entry = {"subset": "train", "annotations": [{"segment": a, "label": "x"} for a in actions.tolist()]}
    database = {"database": {"screen": {**entry, "duration": 3.0, "frame": 60}}}
    [item], problems = find_items(parse_annotations(database), "train", tmp_path, VideoReader(32))
    assert [p.kind for p in problems] == ["frame count"] and item.times is not None
    shown = np.searchsorted(seconds, actions + 1e-9, side="right") - 1
    assert frame_positions(item).tolist() == shown.tolist()
    assert frame_lengths(item) == pytest.approx(np.diff(shown, axis=1)[:, 0], abs=1)
    even = np.trunc(actions / item.duration * item.frames)
    assert np.abs(even - shown).max() > 5  # what the mean rate would have made of them
    clips = make_clips([item], WindowConfig(window_size=64, feature_stride=1, crop_ratio=None), VideoReader(32))
    sample = clips.sample(0, torch.Generator().manual_seed(0))
    assert sample["segments"].tolist() == shown.tolist()
    resized = resized_positions(item, 80)
    assert np.abs(resized / 80 * item.frames - shown).max() <= 1
    whole_video = make_clips([item], WindowConfig("resize", window_size=40, feature_stride=1), VideoReader(32))
    assert whole_video.sample(0, torch.Generator())["segments"].numpy() == pytest.approx(resized / 2, abs=1e-5)
    assert whole_video.fingerprint() != replace(whole_video, items=(item._replace(times=None),)).fingerprint()
    [other], _ = find_items(parse_annotations(database), "train", tmp_path, VideoReader(32), grid="opentad")
    assert frame_positions(other).tolist() == np.trunc(actions / 3.0 * 60).tolist() and other.fps == 20
    database["database"]["screen"].pop("frame")
    with pytest.raises(TensorkeepError, match="grid: opentad needs"):
        find_items(parse_annotations(database), "train", tmp_path, VideoReader(32), grid="opentad")


class Bright(torch.nn.Module):
    """Finds one action: from the first grid step that shows a number from 20 on, to the end of the window."""

    def forward(self, inputs, mask):
        from tensorkeep.detection.model.head import Predictions

        numbers = [number_of(inputs[0, :, t].numpy()) for t in range(inputs.shape[2])]
        first = next((t for t, number in enumerate(numbers) if number >= 20 and mask[0, t]), 0)
        logits, offsets = torch.full((1, 1, mask.shape[1]), -20.0), torch.zeros(1, 2, mask.shape[1])
        logits[0, 0, first], offsets[0, 1, first] = 3.0, float(mask[0].sum()) - first
        points = torch.stack(
            [torch.arange(mask.shape[1]), *[torch.zeros(mask.shape[1])] * 2, torch.ones(mask.shape[1])]
        )
        return Predictions([logits], [offsets], [mask], (points.T.float(),))


@pytest.mark.parametrize("method", ["sliding", "resize"])
def test_an_evaluation_gives_seconds_at_which_frames_are_shown(tmp_path, method):
    path = film(tmp_path / "screen.mkv", times=UNEVEN, b_frames=0, size=(HEIGHT, HEIGHT))
    seconds, _ = presented(path)
    nothing = {"database": {"screen": {"subset": "test", "annotations": []}}}
    [item], _ = find_items(parse_annotations(nothing), "test", tmp_path, VideoReader(HEIGHT))
    clips = make_clips([item], WindowConfig(method, window_size=40, feature_stride=1), VideoReader(HEIGHT))
    [(_, found)] = detect(Bright(), clips, Selection(threshold=0.5, nms=Suppression(limit=1)))
    assert found.segments[0, 0] == pytest.approx(seconds[20], abs=0.005)
    assert seconds_shown(np.array([2.0]), None, 3.0).tolist() == [2.0]


def test_a_frame_at_its_own_time_is_that_frame():
    times = np.arange(0, 300, 3) / 100 * 0.7
    times[50:] += 1.0
    assert np.interp(times, times, np.arange(100)).min() >= 0
    from tensorkeep.detection.data.item import Item

    item = Item("v", "v.mp4", 99, times[-1], 0, 0, np.stack([times[:-1], times[1:]], 1), np.zeros(99), times)
    assert frame_positions(item).tolist() == [[k, k + 1] for k in range(99)]


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx", "b_frames": 0}),
        ("a.ts", {"codec": "libx264"}),
        ("a.avi", {"b_frames": 0}),
    ],
)
def test_footage_that_is_lost_is_named_with_place_and_length(tmp_path, name, how):
    path = torn(film(tmp_path / f"whole_{name}", 60, **how), tmp_path / name, 2)
    assert probe(tmp_path / f"whole_{name}").problem is None
    info, table = probe(path), frame_table(path)
    assert info.problem is not None and "lost" in info.problem and not info.problem.startswith("cut short")
    if "avi" in name:
        assert "12 of 60 pictures are lost" in info.problem and "at frame " in info.problem
        return
    hole = np.diff(table.seconds).argmax()
    place = f"for {np.diff(table.seconds).max():.2f} s after frame {hole} ({table.at(hole):.2f} s)"
    assert place in info.problem and 0.4 < np.diff(table.seconds).max() < 0.8 and 15 <= hole <= 25
    assert [p.kind for p in check_video(path)] == ["damaged video"]


def test_a_long_pause_in_an_even_recording_is_told_and_is_no_damage(tmp_path):
    paused = np.arange(40) * 50 + np.where(np.arange(40) >= 20, 2000, 0)
    info = probe(film(tmp_path / "a.mkv", times=paused, b_frames=0))
    assert info.problem is None and "2.05 s after frame 19 (0.95 s)" in info.notes[0]


@pytest.mark.parametrize("late", [0.0, 0.513])
def test_recordings_that_were_joined_are_named_and_read_one_after_the_other(tmp_path, late):
    one = film(tmp_path / "one.ts", codec="libx264")
    two = film(tmp_path / "two.ts", 30, codec="libx264", start=late)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    info = probe(joined)
    assert "clock starts again at frame 40 (2.00 s)" in str(info.problem)
    assert info.frames == 70 and info.fps == pytest.approx(20)
    assert [number_of(frame) for frame in decode(joined, range(70))] == [*range(40), *range(30)]
    reader = VideoReader(32)
    truth = parse_annotations({"database": {"joined": {"subset": "s", "annotations": []}}})
    with pytest.raises(TensorkeepError, match="clock starts again"):
        find_items(truth, "s", tmp_path, reader)
    _, [kept] = find_items(truth, "s", tmp_path, replace(reader, broken="keep"))
    assert kept.message.startswith("kept: its clock starts again") and kept.kind == "damaged video"


CUT = {
    "a.mkv": {},
    "a.avi": {},
    "a.flv": {"codec": "flv1"},
    "a.wmv": {"codec": "wmv2", "form": "asf"},
    "a.mpg": {"codec": "mpeg2video", "form": "mpeg", "rate": 25},
    "a.ogv": {"codec": "libvpx", "form": "ogg"},
    "a.gif": {"codec": "gif"},
    "a.ts": {"codec": "libx264"},
    "fragments.mp4": {"movflags": "frag_keyframe+default_base_moof+global_sidx", "codec": "libx264"},
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_without_its_end_is_cut_short(tmp_path, name):
    path = film(tmp_path / name, b_frames=0, **CUT[name])
    assert probe(path).problem is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])
    assert "cut short" in str(probe(path).problem)
    assert [p.kind for p in check_video(path)] == ["truncated video"]


def test_what_lies_behind_the_last_picture_of_an_flv_is_told(tmp_path):
    one = film(tmp_path / "one.flv", codec="flv1", b_frames=0)
    joined = tmp_path / "joined.flv"
    joined.write_bytes(one.read_bytes() * 2)  # every player stops after the first
    info = probe(joined)
    assert "bytes, behind frame 39 (2.00 s), cannot be read" in str(info.problem) and info.frames == 40


def test_noise_anywhere_is_damage_or_one_error(tmp_path):
    kinds = {
        "a.flv": {"codec": "libx264", "sound": 3.0},
        "a.mkv": {"sound": 3.0},
        "a.mpg": {"codec": "mpeg2video", "form": "mpeg", "rate": 25},
        "a.ts": {"codec": "libx264", "sound": 3.0},
        "a.avi": {"b_frames": 0, "sound": 3.0},
    }
    for name, how in kinds.items():
        whole_one = film(tmp_path / name, 60, **how).read_bytes()
        for share in (0.2, 0.35, 0.5, 0.65):
            draw = np.random.default_rng(int(share * 100))
            first, length = int(share * len(whole_one)), len(whole_one) // 6
            noise = draw.integers(1, 255, length, dtype=np.uint8).tobytes()
            sick = tmp_path / f"{int(share * 100)}_{name}"
            sick.write_bytes(whole_one[:first] + noise + whole_one[first + length :])
            problems: list = []
            try:
                info = probe(sick)
                decode(sick, range(info.frames), broken="keep", problems=problems)
            except TensorkeepError as error:
                assert sick.name in str(error)
                continue
            assert info.problem or problems, sick.name


def test_pictures_in_a_row_are_told_as_one_and_a_run_says_them_once(tmp_path):
    path = torn(film(tmp_path / "whole.mp4", 60, b_frames=0), tmp_path / "a.mp4", 2)
    problems: list = []
    decode(path, range(60), broken="keep", problems=problems)
    assert len(problems) <= 2 and "frames 24 to 35 (1.20 to 1.75 s) cannot be decoded" in problems[0].message
    with pytest.raises(TensorkeepError, match=r"at 1\.20 s"):
        decode(path, range(60))
    lines: list[str] = []
    told = Told("train", lines.append)
    for _ in range(2):
        told([{"video": "a", "problems": [problems[0].message]}, {"video": "b"}])
    assert lines == [f"train: a: {problems[0].message}"]
    for number in range(50):
        told([{"video": "a", "problems": [f"frame {number}"]}])
    assert len(lines) == 21 and "more" in lines[-1]


def test_another_size_of_pictures_is_told_with_its_place(tmp_path):
    small = film(tmp_path / "small.ts", 20, codec="mpeg2video", rate=25, size=(32, 48))
    large = film(tmp_path / "large.ts", 20, codec="mpeg2video", rate=25, start=10.0)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(large.read_bytes() + small.read_bytes())
    problems: list = []
    frames = probe(joined).frames
    got = decode(joined, range(frames), problems=problems)
    assert got.shape[2:] == (HEIGHT, WIDTH) and number_of(got[5]) == 5
    assert [p.kind for p in problems] == ["size changes"]
    first = frames - 20
    assert f"32 x 48 from frame {first} ({first / 25:.2f} s) on, 64 x 48 before" in problems[0].message


# -- the last window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", range(1, 40))
@pytest.mark.parametrize(("stride", "scale"), [(4, 1), (4, 2), (8, 4), (2, 2)])
def test_the_mask_ends_with_the_last_step_that_has_all_its_frames(frames, stride, scale):
    size, steps = 6, -(-frames // stride)
    first = max(0, steps - size)
    window = make_window((first, steps), frames, size=size, snippet_stride=stride, scale=scale)
    every = np.arange(0, frames, stride // scale)[first * scale : steps * scale]  # as OpenTAD samples and counts
    assert window.mask.sum() == max(len(every) // scale, 1)
    assert window.frames.tolist() == [*every.tolist(), *[every[-1]] * (size * scale - len(every))]


def test_a_number_is_read_back_from_its_picture():
    assert [number_of(picture(n).transpose(2, 0, 1)) for n in range(64)] == list(range(64))
