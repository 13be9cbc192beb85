import json

import numpy as np
import pytest

from tensorkeep.detection.results.results import parse_detections, read_detections, write_detections
from tensorkeep.errors import TensorkeepError


def test_what_is_written_is_read_with_rounded_numbers(tmp_path):
    path = tmp_path / "out.json"
    write_detections(path, {"v": [(1.23456, 2.5, "dive", 0.123456)], "w": [], "x": [(0, 1, "jump", np.float32(0.1))]})
    table = read_detections(path)
    assert (table.video_names, table.label_names) == (("v", "w", "x"), ("dive", "jump"))
    assert table.segments.tolist() == [[1.23, 2.5], [0, 1]] and table.scores.tolist() == [0.1235, 0.1]
    assert table.videos.tolist() == [0, 2] and table.labels.tolist() == [0, 1]
    with pytest.raises(TensorkeepError, match="exists already"):
        write_detections(path, {})


def test_thumos_text_takes_names_from_the_list_or_from_the_kit(tmp_path):
    path = tmp_path / "detections.txt"
    path.write_text("video_2 1.0 2.0 7 0.5\nvideo_1 3.0 4.0 9 0.25\n")
    assert read_detections(path).label_names == ("BaseballPitch", "BasketballDunk")
    table = read_detections(path, {7: "Jump", 9: "Dive"})
    assert table.label_names == ("Jump", "Dive") and table.video_names == ("video_2", "video_1")
    assert table.labels.tolist() == [0, 1] and table.segments.tolist() == [[1, 2], [3, 4]]
    path.write_text("video_1 3.0 4.0 500 0.25\n")
    with pytest.raises(TensorkeepError, match="500"):
        read_detections(path)


@pytest.mark.parametrize("text", ["video 1 2 3", "video 1 2 3 x", "", "video 1 2 3 nan", "video 1 2 3.5 0.5"])
def test_malformed_text_is_refused(tmp_path, text):
    (tmp_path / "d.txt").write_text(text)
    with pytest.raises(TensorkeepError, match=r"d\.txt"):
        read_detections(tmp_path / "d.txt")


@pytest.mark.parametrize(
    "row",
    [
        {},
        3,
        {"label": "a", "score": 1},
        {"label": "a", "segment": [0, 1]},
        {"segment": [0, 1], "score": 1},
        {"label": "a", "segment": [0], "score": 1},
        {"label": "a", "segment": [0, 1], "score": float("nan")},
        {"label": "a", "segment": [0, None], "score": 1},
        {"label": "a", "segment": [0, 1], "score": "high"},
        {"label": "a", "segment": [0, 10**400], "score": 1},
        {"label": ["a"], "segment": [0, 1], "score": 1},
    ],
)
def test_the_first_malformed_detection_is_named(row):
    good = {"label": "a", "segment": [0, 1], "score": 1}
    with pytest.raises(TensorkeepError, match="detection 1 of video 'v'"):
        parse_detections({"results": {"v": [good, row]}})


@pytest.mark.parametrize("document", [[], None, {"results": 3}, {"results": {"v": 3}}])
def test_other_documents_are_refused(document):
    with pytest.raises(TensorkeepError, match="no 'results'"):
        parse_detections(document)


def test_results_may_lie_at_the_top(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"v": [{"label": 3, "segment": [0, 1], "score": 1}]}))
    assert read_detections(tmp_path / "d.json").label_names == ("3",)
