import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.data.annotations import Annotations, Video
from tensorkeep.detection.results.evaluation import evaluate, evaluate_files
from tensorkeep.detection.results.results import parse_detections
from tensorkeep.errors import TensorkeepError
from tests.detection import plain


def annotate(rows, subset="validation", duration=100.0):
    """Annotations from (video, start, end, label) rows."""
    names = list(dict.fromkeys(row[0] for row in rows))
    videos = {}
    for name in names:
        own = [row for row in rows if row[0] == name]
        segments = np.array([row[1:3] for row in own], dtype=np.float64).reshape(-1, 2)
        videos[name] = Video(name, subset, segments, tuple(row[3] for row in own), duration)
    return Annotations(videos, tuple(sorted({row[3] for row in rows})), "opentad", "test")


def detect(rows):
    """Detections from (video, start, end, label, score) rows."""
    results = {}
    for video, start, end, label, score in rows:
        results.setdefault(video, []).append({"segment": [start, end], "label": label, "score": score})
    return parse_detections({"results": results})


segment = st.tuples(st.integers(0, 20), st.integers(1, 10)).map(lambda pair: (pair[0] / 2, (pair[0] + pair[1]) / 2))
truths = st.lists(st.tuples(st.sampled_from("ab"), segment), min_size=1, max_size=12, unique=True)
founds = st.lists(st.tuples(st.sampled_from("abc"), segment, st.integers(0, 20)), max_size=25)


def by_video(rows):
    grouped = {}
    for video, own in rows:
        grouped.setdefault(video, []).append(own)
    return grouped


@given(truths, founds, st.sampled_from([0.1, 0.3, 0.5, 0.7]))
@settings(deadline=None, max_examples=80)
def test_activitynet_precision_equals_the_plain_loop(truth, found, threshold):
    found = sorted(found, key=lambda row: row[0])  # the file keeps a video's detections together
    got = evaluate(
        annotate([(video, *own, "x") for video, own in truth]),
        detect([("a", 50, 51, "other", 1.0), *((video, *own, "x", score) for video, own, score in found)]),
        thresholds=[threshold],
        subset="validation",
    )
    want = plain.average_precision(by_video(truth), found, threshold)
    assert got.ap[0, 0] == pytest.approx(want, abs=1e-12)


@given(
    truths, founds, st.lists(st.tuples(st.sampled_from("ab"), segment), max_size=3), st.sampled_from([0.1, 0.5, 0.7])
)
@settings(deadline=None, max_examples=80)
def test_thumos_precision_equals_the_plain_loop(truth, found, ambiguous, threshold):
    rows = [(video, *own, "x") for video, own in truth] + [(video, *own, "Ambiguous") for video, own in ambiguous]
    detections = detect([("a", 50, 51, "other", 1.0), *((video, *own, "x", score) for video, own, score in found)])
    got = evaluate(annotate(rows), detections, protocol="thumos14", thresholds=[threshold], subset="validation")
    assert got.classes == ("x",)
    want = plain.kit_precision(by_video(truth), found, by_video(ambiguous), threshold)
    assert got.ap[0, 0] == pytest.approx(want, abs=1e-12)


def test_the_threshold_itself_counts_in_activitynet_and_not_in_thumos():
    truth, found = annotate([("v", 0, 2, "x")]), detect([("v", 0, 1, "x", 0.9)])
    assert evaluate(truth, found, thresholds=[0.5]).average == 1
    assert evaluate(truth, found, thresholds=[0.5], protocol="thumos14").average == 0


def test_repetitions_and_empty_segments_are_no_ground_truth_in_opentad():
    truth = annotate([("v", 0, 2, "x"), ("v", 0.0004, 2, "x"), ("v", 5, 5, "x"), ("v", 6, 5, "x")])
    for protocol in ("opentad", "multithumos"):
        got = evaluate(truth, detect([("v", 0, 2, "x", 0.9)]), thresholds=[0.5], protocol=protocol)
        assert (got.segments, got.average, got.notes) == ((1,), 1.0, ())


def test_the_data_sets_own_scripts_count_repetitions_and_empty_segments_and_it_is_said():
    truth = annotate([("v", 0, 2, "x"), ("v", 0.0004, 2, "x"), ("v", 5, 5, "x"), ("v", 7, 9, "x")])
    for protocol in ("activitynet", "epic", "ego4d-mq"):
        got = evaluate(truth, detect([("v", 0, 2, "x", 0.9)]), thresholds=[0.5], protocol=protocol)
        assert (got.segments, got.average) == ((4,), 0.25)
        assert any("1 repeated and 1 empty" in note and "--protocol opentad" in note for note in got.notes)


def test_blocked_videos_count_on_neither_side():
    truth = annotate([("v", 0, 2, "x"), ("w", 0, 2, "x")])
    found = detect([("v", 0, 2, "x", 0.9), ("w", 7, 9, "x", 1.0)])
    assert evaluate(truth, found, thresholds=[0.5]).average < 1
    assert evaluate(truth, found, thresholds=[0.5], blocked=["w"]).average == 1


def test_a_detection_in_a_video_without_annotation_is_a_false_positive_and_said():
    got = evaluate(
        annotate([("v", 0, 2, "x")]), detect([("v", 0, 2, "x", 0.5), ("stray", 0, 2, "x", 0.9)]), thresholds=[0.5]
    )
    assert got.average == 0.5
    assert any("stray" in note for note in got.notes)


def test_ambiguous_is_a_class_in_no_protocol():
    truth = annotate([("v", 0, 2, "x"), ("v", 3, 4, "Ambiguous")])
    for protocol in ("activitynet", "thumos14"):
        assert evaluate(truth, detect([("v", 0, 2, "x", 0.9)]), protocol=protocol, thresholds=[0.3]).classes == ("x",)


def test_ties_are_decided_by_file_order_whatever_else_is_in_the_file():
    truth = annotate([("v", 0, 2, "x")])
    first = detect([("v", 0, 2, "x", 0.5), *(("v", 9, 9.5, "x", 0.5) for _ in range(40))])
    last = detect([*(("v", 9, 9.5, "x", 0.5) for _ in range(40)), ("v", 0, 2, "x", 0.5)])
    assert evaluate(truth, first, thresholds=[0.5]).average == 1
    assert evaluate(truth, last, thresholds=[0.5]).average == pytest.approx(1 / 41)


def test_of_equal_scores_the_range_of_figures_is_said():
    truth = annotate([("v", 0, 2, "x")])
    found = detect([("v", 9, 9.5, "x", 0.5), ("v", 0, 2, "x", 0.5), ("v", 7, 8, "x", 0.5)])
    got = evaluate(truth, found, thresholds=[0.5])
    assert got.average == 0.5 and any("gives 50.00, others 33.33 to 100.00" in note for note in got.notes)
    apart = detect([("v", 9, 9.5, "x", 0.5), ("v", 0, 2, "x", 0.6)])
    assert evaluate(truth, apart, thresholds=[0.5]).notes == ()


def test_recall_is_of_all_segments_in_ego4d_and_else_the_mean_of_classes():
    truth = annotate([("v", 0, 2, "x"), ("v", 4, 6, "x"), ("v", 7, 8, "x"), ("v", 0, 2, "y")])
    found = detect([("v", 0, 2, "y", 0.9), ("v", 0, 2, "x", 0.9)])
    means = evaluate(truth, found, thresholds=[0.5], recall_at=[1])
    pooled = evaluate(truth, found, thresholds=[0.5], recall_at=[1], protocol="ego4d-mq")
    assert means.recall[1][0] == pytest.approx(2 / 3) and pooled.recall[1][0] == 0.5


def test_recall_counts_k_detections_for_each_annotated_segment():
    truth = annotate([("v", 0, 2, "x"), ("v", 4, 6, "x")])
    found = detect([("v", 0, 2, "x", 0.9), ("v", 8, 9, "x", 0.8), ("v", 4, 6, "x", 0.7), ("w", 0, 2, "x", 1.0)])
    got = evaluate(truth, found, thresholds=[0.5], recall_at=[1, 2])
    assert got.recall[1].tolist() == [0.5] and got.recall[2].tolist() == [1.0]


def test_many_small_blocks_of_pairs_give_the_same_result(monkeypatch):
    rng = np.random.default_rng(3)
    truth = annotate([(f"v{i % 3}", s, s + 2, "x") for i, s in enumerate(rng.uniform(0, 30, 30))])
    found = detect(
        [(f"v{i % 3}", s, s + 2, "x", p) for i, (s, p) in enumerate(zip(rng.uniform(0, 30, 90), rng.random(90)))]
    )
    whole = evaluate(truth, found)
    monkeypatch.setattr("tensorkeep.detection.results.matching._BLOCK", 7)
    np.testing.assert_array_equal(evaluate(truth, found).ap, whole.ap)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "voc"},
        {"thresholds": []},
        {"thresholds": [0.0]},
        {"thresholds": [1.5]},
        {"subset": "test"},
        {"recall_at": [0]},
    ],
)
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(TensorkeepError):
        evaluate(annotate([("v", 0, 2, "x")]), detect([("v", 0, 2, "x", 0.9)]), **wrong)


def test_no_ground_truth_is_an_error_and_not_nan():
    with pytest.raises(TensorkeepError, match="nothing to score"):
        evaluate(annotate([("v", 3, 3, "x")]), detect([("v", 0, 2, "x", 0.9)]), protocol="opentad")


def test_the_subset_is_the_one_the_detections_are_about():
    videos = {**annotate([("t", 0, 2, "x")], "training").videos, **annotate([("v", 0, 2, "x")], "Test").videos}
    truth = Annotations(videos, ("x",), "opentad", "test")
    assert evaluate(truth, detect([("v", 0, 2, "x", 0.9)])).subset == "Test"
    with pytest.raises(TensorkeepError, match="subset unclear"):
        evaluate(truth, detect([("v", 0, 2, "x", 0.9), ("t", 0, 2, "x", 0.9)]))
    with pytest.raises(TensorkeepError, match="no video of the detections is annotated"):
        evaluate(truth, detect([("other", 0, 2, "x", 0.9)]))


@pytest.mark.parametrize("annotated,detected", [("v_abc", "abc"), ("abc", "v_abc")])
def test_activitynet_names_match_without_their_prefix(annotated, detected):
    got = evaluate(annotate([(annotated, 0, 2, "x")]), detect([(detected, 0, 2, "x", 0.9)]))
    assert got.average == 1 and any("v_" in note for note in got.notes)


def test_no_detections_at_all_are_a_precision_of_zero():
    for protocol in ("activitynet", "thumos14"):
        got = evaluate(annotate([("v", 0, 2, "x")]), detect([]), subset="validation", protocol=protocol, recall_at=[1])
        assert (got.average, got.detections, got.recall[1].max()) == (0.0, 0, 0.0)


def test_evaluation_runs_without_torch_and_pandas(tmp_path):
    (tmp_path / "gt.json").write_text(
        json.dumps({"database": {"v": {"subset": "val", "annotations": [{"segment": [0, 2], "label": "x"}]}}})
    )
    (tmp_path / "pred.json").write_text(json.dumps({"results": {"v": [{"segment": [0, 2], "label": "x", "score": 1}]}}))
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['pandas'] = None\n"
        "from tensorkeep.detection.results.evaluation import evaluate_files\n"
        "from tensorkeep.detection import check_annotations, analyse_errors\n"
        "print(evaluate_files('gt.json', 'pred.json').average)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1.0", done.stderr


def test_files_of_blocked_names_are_json_or_lines(tmp_path):
    (tmp_path / "gt.json").write_text(
        json.dumps(
            {"database": {n: {"subset": "val", "annotations": [{"segment": [0, 2], "label": "x"}]} for n in "vw"}}
        )
    )
    (tmp_path / "pred.json").write_text(json.dumps({"results": {"v": [{"segment": [0, 2], "label": "x", "score": 1}]}}))
    (tmp_path / "blocked.json").write_text('["w"]')
    (tmp_path / "missing_files.txt").write_text("w\n")
    assert evaluate_files(tmp_path / "gt.json", tmp_path / "pred.json").average == 0.5
    for name in ("blocked.json", "missing_files.txt"):
        assert evaluate_files(tmp_path / "gt.json", tmp_path / "pred.json", blocked=tmp_path / name).average == 1


def test_the_table_and_the_document_say_the_same():
    got = evaluate(annotate([("v", 0, 2, "x")]), detect([("v", 0, 2, "x", 0.9)]), thresholds=[0.3, 0.5])
    assert got.table()[-1] == ["mAP", "1", "100.00", "100.00", "100.00"]
    document = json.loads(json.dumps(got.document()))
    assert document["protocol"] == "activitynet" and document["average_mAP"] == 1 and document["AP"] == {"x": [1, 1]}
