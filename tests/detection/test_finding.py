"""Names: files of videos in training and prediction, integer labels, class names that begin with numbers."""

import json
from pathlib import Path

import pytest

from tensorkeep.detection.data.annotations import number_segments, parse_annotations, read_class_map
from tensorkeep.detection.data.feature_files import SUFFIXES
from tensorkeep.detection.data.finding import find_files, find_videos
from tensorkeep.detection.data.opening import VIDEO_SUFFIXES
from tensorkeep.errors import TensorkeepError

from . import runs


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("there", "pattern", "name", "expected"),
    [
        (("a.mp4", "a.mkv"), "{video}.mkv", "a", "a.mkv"),  # the ending of the pattern, not the first of a list
        (("a.MP4",), "{video}.mp4", "a", "a.MP4"),  # endings in either case
        (("a.MP4", "a.mp4"), "{video}.mp4", "a", "a.mp4"),
        (("a.mpg", "b.mpg"), "{video}.mp4", "a", "a.mpg"),  # another ending where there is none of the one given
        (("a.wmv",), "{video}", "a", "a.wmv"),
        (("a.mp4", "a.txt", "a.json"), "{video}", "a", "a.mp4"),
        (("v_a.MOV",), "v_{video}.mp4", "a", "v_a.MOV"),
        (("day.1.mp4", "day.mp4"), "{video}.mp4", "day.1", "day.1.mp4"),  # a dot is no ending
        (("a.mp4",), "{video}", "a.mp4", "a.mp4"),  # a name that has its ending
        (("P01/P01_1.MP4", "P02/P02_1.MP4"), "{video}.mp4", "P02_1", "P02/P02_1.MP4"),  # below the folder
        (("cam1/a.mp4", "cam2/a.mp4"), "{video}.mp4", "cam2/a", "cam2/a.mp4"),  # equal names told apart by folders
        (("x/cam1/a.avi", "x/cam2/a.avi"), "{video}.mp4", "cam2/a", "x/cam2/a.avi"),
        (("a.mp4", "old/a.mp4"), "{video}.mp4", "a", "a.mp4"),
        (("raw/a.avi", "raw/a.mp4"), "{video}.mp4", "a", "raw/a.mp4"),
    ],
)
def test_the_file_of_a_name_is_found(tmp_path, there, pattern, name, expected):
    found, lacking = find_files(files(tmp_path, *there), [name], pattern, VIDEO_SUFFIXES)
    assert found == {name: tmp_path / expected} and lacking == {}


def test_files_of_features_have_endings_of_their_own(tmp_path):
    files(tmp_path, "a.npy", "b_i3d.NPY", "a.mp4")
    assert find_files(tmp_path, ["a"], "{video}.mp4", SUFFIXES)[0] == {"a": tmp_path / "a.mp4"}  # as it was written
    assert find_files(tmp_path, ["a"], "{video}", SUFFIXES)[0] == {"a": tmp_path / "a.npy"}
    assert find_files(tmp_path, ["b"], "{video}_i3d.npy", SUFFIXES)[0] == {"b": tmp_path / "b_i3d.NPY"}


def test_no_file_and_two_files_are_told_by_name(tmp_path):
    files(tmp_path, "wren.mp4", "wren.avi", "cam1/owl.mp4", "cam2/owl.mp4")
    found, lacking = find_files(tmp_path, ["wren", "owl", "lark"], "{video}", VIDEO_SUFFIXES)
    assert found == {} and list(lacking) == ["wren", "owl", "lark"]
    assert "wren.avi and wren.mp4" in lacking["wren"] and "cam1/owl.mp4 and cam2/owl.mp4" in lacking["owl"]
    assert lacking["lark"].startswith("no lark")
    with pytest.raises(TensorkeepError, match="no such file or folder"):
        find_files(tmp_path / "gone", ["a"], "{video}", VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    "address", ["https://me:s3cret@host:9/films/match.mp4", "rtsp://me:s3cret@cam/live", "s3://k:s3cret@b/match.mp4"]
)
def test_an_address_keeps_its_slashes_and_hides_its_password(tmp_path, address):
    for call in (lambda: find_videos([address]), lambda: find_files(address, ["a"], "{video}", VIDEO_SUFFIXES)):
        with pytest.raises(TensorkeepError) as caught:
            call()
        assert "s3cret" not in str(caught.value) and address.split("@")[1] in str(caught.value)
        assert f"{address.split('//')[0]}//" in str(caught.value)


def test_folders_mean_their_videos_and_no_two_share_a_name(tmp_path):
    files(tmp_path, "b.mp4", "a.MKV", "notes.txt")
    assert find_videos([tmp_path, tmp_path / "b.mp4", "there.mov"]) == {
        "a": tmp_path / "a.MKV",
        "b": tmp_path / "b.mp4",
        "there": Path("there.mov"),
    }
    with pytest.raises(TensorkeepError, match="both be called 'b'"):
        find_videos([tmp_path, "elsewhere/b.avi"])
    with pytest.raises(TensorkeepError, match="holds no video"):
        find_videos([files(tmp_path / "empty", "a.txt")])


def test_videos_below_a_folder_are_told_apart_by_theirs(tmp_path):
    files(tmp_path, "one/clip.mp4", "two/clip.MPG", "two/other.wmv")
    assert list(find_videos([tmp_path])) == ["one/clip", "two/clip", "other"]
    files(tmp_path, "one/clip.avi")
    with pytest.raises(TensorkeepError, match="both be called 'one/clip'"):
        find_videos([tmp_path])


# -- classes ----------------------------------------------------------------------------------------------------------


def annotated(*labels: object) -> dict:
    rows = [{"segment": [k, k + 1], "label": label} for k, label in enumerate(labels)]
    return {"database": {"v": {"subset": "train", "annotations": rows}}}


@pytest.mark.parametrize("labels", [(2, 10, 1), ("2", "10", "1")])
def test_labels_that_are_numbers_are_in_their_order(labels):
    made = parse_annotations(annotated(*labels))
    assert made.classes == ("1", "2", "10")
    assert number_segments(made.videos["v"], made.classes)[1].tolist() == [1, 2, 0]
    assert parse_annotations(annotated("10", "b", "2")).classes == ("10", "2", "b")
    with pytest.raises(TensorkeepError, match="labels are numbers here"):
        number_segments(made.videos["v"], ("hop", "ride"))


@pytest.mark.parametrize(
    ("lines", "labels", "expected"),
    [
        (("5 meter dive", "3 point shot", "1 leg stand"), None, "lines"),
        (("5 meter dive", "3 point shot", "1 leg stand"), "lines", "lines"),
        (("1 leg stand", "2 leg stand"), "lines", "lines"),
        (("1 point", "2 points"), "lines", "lines"),
        (("2 Dive", "1 Clean and jerk"), "names", ("Clean and jerk", "Dive")),
        (("2 Dive", "1 Clean and jerk"), None, ("Clean and jerk", "Dive")),
        (("7 BaseballPitch", "9 BasketballDunk"), None, ("BaseballPitch", "BasketballDunk")),
    ],
)
def test_a_class_map_of_names_that_begin_with_numbers_keeps_them(tmp_path, lines, labels, expected):
    (tmp_path / "map.txt").write_text("\n".join(lines))
    known = {None: (), "lines": lines, "names": [line.split(None, 1)[1] for line in lines]}[labels]
    assert read_class_map(tmp_path / "map.txt", known) == (lines if expected == "lines" else expected)


def test_a_recipe_reads_its_class_map_beside_its_annotations(tmp_path):
    from tensorkeep.detection.recipe_data import read_classes

    classes = ("1 leg stand", "2 leg stand", "3 leg stand")
    (tmp_path / "map.txt").write_text("\n".join(classes))
    (tmp_path / "gt.json").write_text(json.dumps(annotated(*classes)))
    recipe = runs.recipe(tmp_path, data__class_map=json.dumps(str(tmp_path / "map.txt")), model__head__classes="3")
    changed = recipe.data.train.__class__(str(tmp_path / "gt.json"), "train", str(tmp_path))
    object.__setattr__(recipe.data, "train", changed)
    assert read_classes(recipe) == classes
