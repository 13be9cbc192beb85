"""EPIC-Kitchens' and Ego4D's own files: read as published, scored by verb, noun and action."""

import json
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import main
from tensorkeep.detection.data.annotations import parse_annotations
from tensorkeep.detection.data.epic import read_epic
from tensorkeep.detection.results.epic import read_epic_detections
from tensorkeep.errors import TensorkeepError

HEAD = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,verb,verb_class,noun,noun_class"
ROWS = [
    "P01_1_0,P01,P01_1,00:00:01.00,00:00:03.00,take,0,cup,4",
    "P01_1_1,P01,P01_1,00:01:05.50,00:01:07.50,put,1,cup,4",
    "P02_1_0,P02,P02_1,01:00:00.00,01:00:04.00,take,0,pan,12",
]
FOUND = {
    "P01_1": [
        {"verb": 0, "noun": 4, "action": "0,4", "score": 0.9, "segment": [1.0, 3.0]},
        {"verb": 1, "noun": 12, "action": "1,12", "score": 0.8, "segment": [65.5, 67.5]},
    ],
    "P02_1": [{"verb": 0, "noun": 12, "action": "0,12", "score": 0.7, "segment": [3600.0, 3604.0]}],
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    truth, found = tmp_path / "EPIC_100_validation.csv", tmp_path / "submission.json"
    truth.write_text("\n".join([HEAD, *ROWS]) + "\n")
    found.write_text(json.dumps({"version": "0.2", "challenge": "action_detection", "results": FOUND}))
    return truth, found


def scored(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["eval", "detection", *map(str, words)])
    return code, *capsys.readouterr()


def test_verbs_nouns_and_actions_are_scored_apart(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--annotations", files[0], "--detections", files[1])
    code, out, _ = scored(capsys, *words, "--json", "--recall", "1,5")
    document = json.loads(out)
    assert code == 0 and document["protocol"] == "epic" and document["tiou"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    parts = document["parts"]
    assert parts["verb"]["average_mAP"] == 1.0 and parts["verb"]["segments"] == {"0": 2, "1": 1}
    # the wrong noun: of class 4 one of two is found, of class 12 one, behind a false one of a higher score
    assert parts["noun"]["AP"]["4"][0] == 0.5 and parts["noun"]["AP"]["12"][0] == 0.5
    assert parts["action"]["average_mAP"] == pytest.approx(2 / 3) == document["average_mAP"]
    assert set(parts["action"]["AP"]) == {"0,4", "1,4", "0,12"} and set(document["recall"]) == {"1", "5"}
    code, out, _ = scored(capsys, *words)
    assert code == 0 and [f"of {task}s" in out for task in ("verb", "noun", "action")] == [True] * 3


def test_a_submission_of_verbs_alone_is_scored_for_verbs(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        video: [{k: row[k] for k in ("verb", "score", "segment")} for row in found] for video, found in FOUND.items()
    }
    files[1].write_text(json.dumps({"results": rows}))
    code, out, _ = scored(capsys, "--annotations", files[0], "--detections", files[1], "--json")
    document = json.loads(out)
    assert code == 0 and set(document["parts"]) == {"verb"} and document["average_mAP"] == 1.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("00:00:01.00", "1.0", "line 2: '1.0' is no time"),
        ("verb_class", "verb_id", "no column verb_class"),
        ("cup,4", "cup,x", "noun_class 'x' is no whole number"),
    ],
)
def test_a_csv_that_is_none_of_theirs_is_one_error(files: tuple[Path, Path], old: str, new: str, said: str) -> None:
    files[0].write_text(files[0].read_text().replace(old, new))
    with pytest.raises(TensorkeepError, match=said):
        read_epic(files[0])


def test_a_row_without_a_class_that_others_have_is_named(files: tuple[Path, Path]) -> None:
    files[1].write_text(files[1].read_text().replace('"noun": 12, "action": "0,12"', '"noun": "pan", "action": "0,12"'))
    with pytest.raises(TensorkeepError, match="detection 2 has no noun class"):
        read_epic_detections(files[1])


def test_ego4d_clips_and_its_published_file_are_one() -> None:
    labels = [
        {"start_time": 1.0, "end_time": 2.5, "label": "wash", "primary": True},
        {"start_time": 1.0, "end_time": 9.0, "label": "cook", "primary": False},
    ]
    clip = {"clip_uid": "c1", "video_start_sec": 30, "video_end_sec": 510, "annotations": [{"labels": labels}]}
    raw = {"videos": [{"video_uid": "u", "split": "val", "clips": [clip]}]}
    own = {"clip_id": "c1", "subset": "val", "parent_start_sec": 30, "fps": 1.875, "annotations": labels[:1]}
    for document in (raw, {"c1": own}):
        read = parse_annotations(document)
        video = read.videos["c1"]
        assert (read.layout, video.subset, video.labels, video.fps) == ("ego4d", "val", ("wash",), None)
        assert video.segments.tolist() == [[1.0, 2.5]]
    with pytest.raises(TensorkeepError, match="no list 'labels'"):
        parse_annotations({"videos": [{"split": "val", "clips": [{"clip_uid": "c", "annotations": [{}]}]}]})


def test_ego4d_s_submission_is_scored_by_its_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = {"start_time": 1.0, "end_time": 2.5, "label": "wash"}
    (tmp_path / "clips.json").write_text(json.dumps({"c1": {"subset": "val", "annotations": [label]}}))
    row = {"segment": [1.0, 2.5], "label": "wash", "score": 0.9}
    made = {
        "version": "1.0",
        "challenge": "ego4d_moment_queries",
        "detect_results": {"c1": [row]},
        "retrieve_results": {},
    }
    (tmp_path / "submission.json").write_text(json.dumps(made))
    files = ("--annotations", tmp_path / "clips.json", "--detections", tmp_path / "submission.json")
    code, out, _ = scored(capsys, *files, "--json")
    assert code == 0 and json.loads(out)["average_mAP"] == 1.0 and json.loads(out)["protocol"] == "ego4d-mq"


@pytest.mark.parametrize("words", [("0",), ("1,x",), (",",)])
def test_recall_takes_whole_numbers(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, _, err = scored(capsys, "--annotations", files[0], "--detections", files[1], "--recall", *words)
    assert code == 2 and "--recall" in err
