"""From a table of times and a folder of videos to annotations: files, seconds and subsets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tensorkeep.detection.data.annotations import read_annotations
from tests.detection.films import film

pytest.importorskip("av")
HEAD = "video,start,end,label\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three films of 40 frames and 2 s, one of them in a folder below."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "a.mp4")
    film(folder / "B.mkv")
    (folder / "cam1").mkdir()
    film(folder / "cam1" / "c.avi")
    return folder


def annotate(videos: Path, tmp_path: Path, text: str, *more: str) -> int:
    (tmp_path / "t.csv").write_text(text)
    return main(["annotate", f"{tmp_path}/t.csv", "--videos", str(videos), "-o", f"{tmp_path}/gt.json", *more])


ROWS = "a.mp4,0.2,0.9,x\nb,0.1,0.5,x\ncam1/c,0.3,1.5,y\nc,0.2,0.4,x\nB,1,1.5,y\n"


def test_a_table_becomes_annotations_that_say_what_the_videos_say(videos, tmp_path, capsys):
    assert annotate(videos, tmp_path, HEAD + ROWS) == 0
    said = capsys.readouterr()
    got = read_annotations(tmp_path / "gt.json")
    assert list(got.videos) == ["B", "a", "c"] and got.classes == ("x", "y")
    assert all((v.frames, v.duration) == (40, 2.0) for v in got.videos.values())
    assert got.videos["c"].segments.tolist() == [[0.2, 0.4], [0.3, 1.5]]
    [validation] = got.of_subset("validation")
    assert len(got.of_subset("training")) == 2 and f"validation: {validation.name};" in said.err
    assert {label for v in got.of_subset("training") for label in v.labels} == {"x", "y"}
    assert "b is B.mkv" in said.err and "--model.head.classes 2" in said.out
    assert annotate(videos, tmp_path, HEAD + ROWS) == 2  # it is there already
    assert annotate(videos, tmp_path, HEAD + ROWS, "--overwrite", "--json", "--validation", "0") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["subsets"] == {"training": 3} and document["actions"] == {"x": 3, "y": 2}


def test_frames_are_the_pictures_of_the_file(videos, tmp_path, capsys):
    text = "video,start_frame,end_frame,label\na,4,18,x\nB,0,40,x\nc,1,2,x\n"
    assert annotate(videos, tmp_path, text) == 0
    assert read_annotations(tmp_path / "gt.json").videos["a"].segments.tolist() == [[0.2, 0.9]]
    assert "frame n is the picture n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, why",
    [
        ("a,4,18,x\n", "as frames all of them lie in their videos"),
        ("a,400,1800,x\n", "--unit milliseconds"),
        ("a,0:01:00,0:02:00,x\n", "hours of minutes"),
        ("a,1,20000,x\n", "about other videos"),
        ("d,0,1,x\n", "no video 'd'"),
        ("a,0,1,x\nB,0,1,y\n", "no video can be kept for validation"),
    ],
)
def test_what_does_not_fit_the_videos_is_refused_with_the_likely_cause(videos, tmp_path, capsys, rows, why):
    assert annotate(videos, tmp_path, HEAD + rows) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "gt.json").exists()


def test_subsets_of_the_table_stay(videos, tmp_path, capsys):
    text = "video,start,end,label,split\na,0,1,x,train\nB,0,1,x,test\n"
    assert annotate(videos, tmp_path, text, "--validation", "0.3") == 2
    assert annotate(videos, tmp_path, text) == 0
    assert read_annotations(tmp_path / "gt.json").subsets() == ("test", "train")
    said = capsys.readouterr()
    assert "--data.test.subset test" in said.out and "since no table names them (1)" in said.err


def test_two_files_of_one_name_are_told_apart_or_refused(tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        film(tmp_path / folder / "a.mp4", 20)
    assert annotate(tmp_path, tmp_path, HEAD + "a,0,0.5,x\n") == 2
    assert "could be" in capsys.readouterr().err
    assert annotate(tmp_path, tmp_path, HEAD + "one/a,0,0.5,x\ntwo/a.mp4,0,0.5,x\n") == 0
    assert list(read_annotations(tmp_path / "gt.json").videos) == ["one/a", "two/a"]
