import json

import numpy as np
import pytest

from tensorkeep.detection.data.annotation_checks import check_annotations
from tensorkeep.detection.data.annotations import (
    Video,
    number_segments,
    parse_annotations,
    read_annotations,
    read_class_ids,
    read_class_map,
    unique_segments,
)
from tensorkeep.errors import TensorkeepError

SOUND = {"subset": "train", "duration": 20.0, "frame": 600, "annotations": [{"segment": [1.0, 2.5], "label": "dive"}]}


def test_opentad_and_activitynet_files_are_read():
    got = parse_annotations({"database": {"v": SOUND}})
    video = got.videos["v"]
    assert (got.layout, got.classes, got.subsets()) == ("opentad", ("dive",), ("train",))
    assert (video.duration, video.frames, video.frame_rate()) == (20.0, 600, 30.0)
    np.testing.assert_array_equal(video.segments, [[1.0, 2.5]])


def test_actionformer_ids_give_the_class_order():
    rows = [{"segment": [0, 1], "label": "a", "label_id": 1}, {"segment": [0, 1], "label": "z", "label_id": 0}]
    got = parse_annotations({"database": {"v": {"subset": "Test", "duration": 3, "fps": 25.0, "annotations": rows}}})
    assert (got.layout, got.classes, got.videos["v"].frame_rate()) == ("actionformer", ("z", "a"), 25.0)


def test_one_label_with_two_ids_is_refused():
    rows = [{"segment": [0, 1], "label": "a", "label_id": number} for number in (0, 1)]
    with pytest.raises(TensorkeepError, match="elsewhere 0"):
        parse_annotations({"database": {"v": {"annotations": rows}}})


def test_mmaction_files_have_no_database_around_the_videos():
    entry = {"duration_second": 5.0, "duration_frame": 125, "annotations": [{"segment": [0, 1], "label": "a"}]}
    got = parse_annotations({"v_1": entry})
    assert (got.layout, got.videos["v_1"].frames, got.videos["v_1"].duration) == ("mmaction", 125, 5.0)


def test_a_thumos_folder_is_read_in_file_order_with_its_class_list(tmp_path):
    (tmp_path / "Dive_test.txt").write_text("video_2  3.0 4.0\nvideo_1 1.0 2.0\nvideo_2 0.5 0.9\n")
    (tmp_path / "Ambiguous_test.txt").write_text("video_1 5.0 6.0\n")
    (tmp_path / "Jump_val.txt").write_text("video_3 5.0 6.0\n")
    (tmp_path / "detclasslist.txt").write_text("7 Jump\n9 Dive\n")
    got = read_annotations(tmp_path)
    assert (got.layout, got.classes, got.subsets()) == ("thumos", ("Jump", "Dive"), ("test", "validation"))
    np.testing.assert_array_equal(got.videos["video_2"].segments, [[3.0, 4.0], [0.5, 0.9]])
    assert set(got.videos["video_1"].labels) == {"Dive", "Ambiguous"}
    assert read_class_ids(tmp_path / "detclasslist.txt") == {7: "Jump", 9: "Dive"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"database": 3}',
        '{"database": {"v": 1}}',
        '{"database": {"v": {"annotations": {}}}}',
        '{"database": {"v": {"annotations": [{"label": "a"}]}}}',
        '{"database": {"v": {"annotations": [{"segment": [0, 1]}]}}}',
        '{"database": {"v": {"annotations": [{"segment": [0, NaN], "label": "a"}]}}}',
        '{"database": {"v": {"annotations": [{"segment": [0, true], "label": "a"}]}}}',
        '{"database": {"v": {"annotations": [{"segment": [0, 1, 2], "label": "a"}]}}}',
        '{"database": {"v": {"duration": "long"}}}',
        '{"database": {"v": {"duration": 1' + "0" * 400 + "}}}",
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_malformed_files_give_one_clear_error(tmp_path, text):
    path = tmp_path / "anno.json"
    path.write_text(text)
    with pytest.raises(TensorkeepError, match=r"anno\.json"):
        read_annotations(path)


def test_bytes_and_missing_files_give_one_clear_error(tmp_path):
    (tmp_path / "anno.json").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("anno.json", "none.json"):
        with pytest.raises(TensorkeepError, match=name):
            read_annotations(tmp_path / name)
    with pytest.raises(TensorkeepError, match="no CLASS_test"):
        read_annotations(tmp_path)


@pytest.mark.parametrize("line", ["video 1.0", "video 1.0 x", "video 1.0 inf", "video 1 2 3"])
def test_malformed_thumos_lines_are_named(tmp_path, line):
    (tmp_path / "Dive_test.txt").write_text(f"video 0 1\n{line}\n")
    with pytest.raises(TensorkeepError, match="line 2"):
        read_annotations(tmp_path)


def test_class_maps_are_names_in_label_order(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("Jump\n\nClean and jerk\n")
    assert read_class_map(path) == ("Jump", "Clean and jerk")
    path.write_text("2 Dive\n1 Jump\n")
    assert read_class_map(path) == ("Jump", "Dive")
    for text in ("", "a\na\n"):
        path.write_text(text)
        with pytest.raises(TensorkeepError):
            read_class_map(path)


def test_repetitions_have_the_same_label_and_nearly_the_same_ends():
    segments = np.array([[1.0, 2.0], [1.0005, 2.0], [1.002, 2.0], [1.0, 2.0]])
    assert unique_segments(segments, ["a", "a", "a", "b"]).tolist() == [0, 2, 3]


def test_numbered_segments_lack_repetitions_and_ambiguous_ones():
    video = Video("v", "train", np.array([[0, 1], [0, 1], [2, 3], [4, 5.0]]), ("b", "b", "Ambiguous", "a"))
    segments, numbers = number_segments(video, ["Ambiguous", "a", "b"])
    assert segments.tolist() == [[0, 1], [4, 5]] and numbers.tolist() == [2, 1]
    with pytest.raises(TensorkeepError, match="not in the class map"):
        number_segments(video, ["a"])


def check(subsets=(), class_map=None, **changes):
    entry = json.loads(json.dumps({**SOUND, **changes}))
    return check_annotations(parse_annotations({"database": {"v": entry}}), subsets=subsets, class_map=class_map)


def row(start, end, label="dive"):
    return {"segment": [start, end], "label": label}


def test_sound_annotations_have_no_problem():
    assert check(subsets=["train"], class_map=["dive"]) == []


@pytest.mark.parametrize(
    "severity,kind,asked",
    [
        ("error", "unknown subset", {"subsets": ["trian"]}),
        ("error", "no ground truth", {"annotations": []}),
        ("error", "no ground truth", {"subsets": ["train"], "annotations": [row(1, 2, "Ambiguous")]}),
        ("error", "label not in the map", {"class_map": ["jump"]}),
        ("warning", "class without segments", {"class_map": ["dive", "jump"]}),
        ("info", "ambiguous segments", {"annotations": [row(1, 2, "Ambiguous"), row(1, 2)]}),
        ("error", "no duration", {"duration": 0}),
        ("error", "frame count", {"frame": 6}),
        ("error", "frame count", {"frame": 0}),
        ("warning", "frame count", {"frame": 600, "fps": 25.0}),
        ("warning", "unknown subset", {"subset": ""}),
        ("error", "ends before it starts", {"annotations": [row(3, 2)]}),
        ("warning", "zero length", {"annotations": [row(3, 3)]}),
        ("warning", "before the start", {"annotations": [row(-1, 2)]}),
        ("error", "past the end", {"annotations": [row(21, 22)]}),
        ("warning", "past the end", {"annotations": [row(19, 22)]}),
        ("warning", "duplicate", {"annotations": [row(1, 2), row(1.0005, 2)]}),
    ],
)
def test_each_problem_is_named(severity, kind, asked):
    found = [(problem.severity, problem.kind) for problem in check(**asked)]
    assert (severity, kind) in found


def test_messages_suggest_what_was_meant():
    problem = check(subsets=["trian"])[0]
    assert "did you mean train?" in problem.message


def test_a_class_that_one_subset_lacks_is_told():
    database = {
        "a": {**SOUND, "annotations": [row(1, 2), row(3, 4, "jump")]},
        "b": {**SOUND, "subset": "test"},
    }
    problems = check_annotations(parse_annotations({"database": database}))
    assert [(problem.kind, "jump" in problem.message) for problem in problems] == [("class absent from subset", True)]
