import json

import numpy as np
import pytest

pytest.importorskip("av")

from tensorkeep.detection.data.annotation_checks import check_annotations
from tensorkeep.detection.data.annotations import read_annotations, read_class_map
from tensorkeep.detection.data.containers import probe
from tensorkeep.detection.data.picture_checks import check_pictures
from tensorkeep.detection.data.synthetic import (
    CLASSES,
    MOTIONS,
    TINY,
    Action,
    Shape,
    SyntheticConfig,
    _paint,
    _pose,
    make_clip,
    make_dataset,
    make_video,
    write_video,
)
from tensorkeep.detection.data.video import decode
from tensorkeep.errors import TensorkeepError

SHORT = SyntheticConfig(seconds=(6.0, 9.0), actions=(2, 4), action_seconds=(1.0, 2.0), size=48, fps=8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    make_dataset(folder, videos=2, held_out=1, seed=5, config=SHORT)
    return folder


def test_the_same_seed_gives_the_same_bytes_and_a_video_does_not_depend_on_how_many_there_are(dataset, tmp_path):
    make_dataset(tmp_path / "again", videos=1, held_out=1, seed=5, config=SHORT)
    other = make_dataset(tmp_path / "other", videos=1, held_out=0, seed=6, config=SHORT)
    for name in ("training_0000", "validation_0000"):
        file = f"videos/{name}.mp4"
        assert (dataset / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    before, after = (
        json.loads((f / "annotations.json").read_text())["database"] for f in (dataset, tmp_path / "again")
    )
    assert after.items() <= before.items()
    assert len({(dataset / f"videos/{name}.mp4").read_bytes() for name in before}) == 3
    assert other.videos["training_0000"].segments.tolist() != before["training_0000"]["annotations"]


def test_bytes_do_not_depend_on_what_lay_in_memory_before(tmp_path):
    frames, _ = make_video(TINY, np.random.default_rng([0, 1, False]))
    found = set()
    for number in range(10):
        rng = np.random.default_rng(number)
        left = [rng.integers(0, 255, size).astype(np.uint8) for size in rng.integers(1000, 300_000, 40)]
        del left
        write_video(tmp_path / "video.mp4", frames, TINY.fps)
        found.add((tmp_path / "video.mp4").read_bytes())
    assert len(found) == 1


def test_files_and_annotations_agree(dataset):
    annotations = read_annotations(dataset / "annotations.json")
    classes = read_class_map(dataset / "category_idx.txt")
    assert set(classes) == set(CLASSES) and set(annotations.classes) <= set(classes)
    problems = check_annotations(annotations, subsets=["training", "validation"], class_map=classes)
    assert [problem for problem in problems if problem.severity == "error"] == []
    for name, video in annotations.videos.items():
        path = dataset / "videos" / f"{name}.mp4"
        assert check_pictures(path, video) == []
        assert probe(path).frames == video.frames and 2 <= len(video.labels) <= 4
        assert (np.diff(video.segments, axis=1) >= 0.99).all()


def test_what_is_written_is_what_was_drawn(dataset):
    frames, actions = make_video(SHORT, np.random.default_rng([5, 1, False]))
    assert actions and frames.shape[1:] == (48, 48, 3)
    read = decode(dataset / "videos" / "training_0001.mp4", range(len(frames))).permute(0, 2, 3, 1).numpy()
    assert np.abs(read.astype(int) - frames).mean() < 6  # a lossy codec with halved colour


def test_actions_of_one_actor_never_meet_and_those_of_two_may():
    overlaps = 0
    for seed in range(40):
        _, actions = make_video(SyntheticConfig(seconds=(9, 9), size=16, fps=4), np.random.default_rng(seed))
        assert actions == sorted(actions, key=lambda action: action.start)
        for k, one in enumerate(actions):
            assert 0 <= one.start < one.end <= 9
            for other in actions[k + 1 :]:
                meet = one.start < other.end and other.start < one.end
                assert not (meet and one.actor == other.actor)
                overlaps += meet
    assert overlaps > 5


@pytest.mark.parametrize("label", MOTIONS)
def test_the_class_lies_in_the_motion_and_survives_a_mirror(label):
    shape = Shape(3, np.full(3, 200.0), 0.2, np.array([0.5, 0.5]), np.zeros(2), 0.4)
    action = Action(0, label, 0.0, 10.0)

    def drawn(acting: Action | None, now: float) -> np.ndarray:
        canvas = np.zeros((48, 48, 3))
        _paint(canvas, shape, *_pose(shape, acting, now, {action: MOTIONS[label]}))
        return canvas

    times = np.arange(0.05, 5, 0.07)
    moving = np.array([drawn(action, now) for now in times])
    resting = np.array([drawn(None, now) for now in times])
    assert np.abs(np.diff(moving, axis=0)).mean() > 20 * np.abs(np.diff(resting, axis=0)).mean()
    nearest = min(np.abs(frame - resting[0]).mean() for frame in moving)
    assert nearest < 0.3 * np.abs(moving - resting[0]).mean(axis=(1, 2, 3)).max()  # some moment looks like rest
    cycle = 1 / MOTIONS[label]  # it repeats, so that no direction of it is special
    again = drawn(action, 0.7 + cycle)
    assert np.abs(again - drawn(action, 0.7)).mean() < 0.5


def test_calm_videos_show_bright_shapes_on_a_dark_ground_and_busy_ones_do_not():
    for seed in range(5):
        calm, busy = (make_video(config, np.random.default_rng(seed))[0].mean(-1) for config in (TINY, SHORT))
        assert calm.max() > 180 and np.median(calm) < 95 < np.median(busy)


def test_a_clip_shows_its_motion_from_end_to_end():
    config = SyntheticConfig(**{**TINY.__dict__, "actors": 1, "distractors": 0})
    for label in TINY.classes:
        moving, resting = (make_clip(config, name, 30, np.random.default_rng(3)) for name in (label, None))
        assert moving.shape == (30, 32, 32, 3) and moving.dtype == np.uint8
        change = [np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3)) for clip in (moving, resting)]
        thirds = [part.max() for part in np.split(change[0][:27], 3)]
        assert min(thirds) > 1.5 * np.median(change[1]), label


def test_a_data_set_is_there_whole_or_not_at_all(dataset, tmp_path, monkeypatch):
    with pytest.raises(TensorkeepError, match="exists already"):
        make_dataset(dataset, videos=1, config=SHORT)
    from tensorkeep.detection.data import synthetic

    def fail(*arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr(synthetic, "write_video", fail)
    with pytest.raises(OSError, match="no space"):
        make_dataset(tmp_path / "half", videos=1, config=SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"classes": ("slid",)}, {"classes": ()}, {"size": 33}, {"seconds": (5.0, 1.0)}])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(TensorkeepError):
        SyntheticConfig(**change)
