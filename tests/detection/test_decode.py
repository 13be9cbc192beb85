import json

import numpy as np
import pytest

from tensorkeep.detection.results.classifiers import read_classifier
from tensorkeep.detection.results.decode import (
    decode_offsets,
    fuse_classes,
    merge_windows,
    resized_seconds,
    round_detections,
    select_candidates,
    sliding_seconds,
)
from tensorkeep.detection.results.nms import Detections, Suppression, suppress
from tensorkeep.errors import TensorkeepError


def random_detections(seed, number):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 50, number)
    segments = np.stack([start, start + rng.uniform(0, 9, number)], axis=1).astype(np.float32)
    return Detections(segments, rng.random(number, dtype=np.float32), rng.integers(0, 4, number))


def test_offsets_count_in_strides_from_the_point():
    points = np.array([[8, 0, 4, 1], [8, 4, 8, 2]], dtype=np.float32)
    np.testing.assert_array_equal(decode_offsets(points, np.array([[1, 2], [1, 2]], np.float32)), [[7, 10], [6, 12]])


def test_candidates_are_the_best_pairs_of_proposal_and_class_above_the_threshold():
    scores = np.array([[0.5, 0.0005, 0.2], [0.9, 0.001, 0.3]], dtype=np.float32)
    got = select_candidates(np.array([[0, 1], [2, 3]], np.float32), scores, threshold=1e-3, limit=3)
    np.testing.assert_array_equal(got.scores, np.array([0.9, 0.5, 0.3], np.float32))
    assert got.labels.tolist() == [0, 0, 2] and got.segments.tolist() == [[2, 3], [0, 1], [2, 3]]


def test_a_head_of_one_class_keeps_every_proposal_in_order():
    scores = np.array([[0.0], [0.9]], dtype=np.float32)
    got = select_candidates(np.array([[0, 1], [2, 3]], np.float32), scores, threshold=0.5, limit=1)
    assert got.segments.tolist() == [[0, 1], [2, 3]]


def test_seconds_stay_within_the_video():
    steps = np.array([[-5, 10], [0, 1000]], dtype=np.float32)
    np.testing.assert_array_equal(
        sliding_seconds(steps, fps=10, duration=20, snippet_stride=4, window_start=40, offset=0), [[2, 8], [4, 20]]
    )
    np.testing.assert_array_equal(resized_seconds(steps, duration=20, length=100), [[0, 2], [0, 20]])


def test_rounding_is_that_of_python():
    found = random_detections(0, 5000)
    rounded = round_detections(found)
    for before, after, digits in (
        (found.segments.ravel(), rounded.segments.ravel(), 2),
        (found.scores, rounded.scores, 4),
    ):
        assert [np.float32(round(float(value), digits)) for value in before] == after.tolist()


def test_merged_windows_are_one_video():
    parts = [random_detections(seed, 30) for seed in range(3)]
    whole = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    rule = Suppression(sigma=0.7, limit=50)
    for got, want in zip(merge_windows(parts, rule), suppress(whole, rule), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(merge_windows([], rule).scores) == 0


@pytest.mark.parametrize("rule", ["product", "geometric"])
def test_fusion_names_each_detection_by_the_best_classes(rule):
    found = Detections(np.array([[0, 1], [2, 3]], np.float32), np.array([0.9, 0.2], np.float32), np.zeros(2, np.int64))
    got = fuse_classes(found, np.array([0.1, 0.5, 0.4]), top=2, rule=rule)
    product = np.array([0.45, 0.1, 0.36, 0.08])
    np.testing.assert_allclose(got.scores, product if rule == "product" else np.sqrt(product), rtol=1e-6)
    assert got.labels.tolist() == [1, 1, 2, 2] and got.segments.tolist() == [[0, 1], [2, 3]] * 2


def test_impossible_requests_are_refused():
    found = random_detections(0, 3)
    with pytest.raises(TensorkeepError):
        fuse_classes(found, np.array([0.5, 0.5]), top=3)
    with pytest.raises(TensorkeepError):
        fuse_classes(found, np.array([0.5, 0.5]), top=1, rule="sum")
    with pytest.raises(TensorkeepError):
        select_candidates(np.zeros((2, 2), np.float32), np.zeros(2, np.float32))
    with pytest.raises(TensorkeepError):
        sliding_seconds(found.segments, fps=0, duration=1, snippet_stride=1)
    with pytest.raises(TensorkeepError):
        resized_seconds(found.segments, duration=0, length=1)


def test_classifiers_are_read_from_both_layouts(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"results": {"v": [0.25, 0.75]}, "class": ["a", "b"]}))
    got = read_classifier(tmp_path / "c.json")
    assert got.classes == ("a", "b") and got.of("v_v").tolist() == [0.25, 0.75]
    with pytest.raises(TensorkeepError, match="does not know"):
        got.of("other")
    table = np.random.default_rng(0).random((3, 101))
    np.save(tmp_path / "unet.npy", table)
    got = read_classifier(tmp_path / "unet.npy")
    assert got.classes[0] == "BaseballPitch" and len(got.classes) == 20
    assert got.of("video_test_0000002")[0] == table[1, 6]


def test_malformed_classifiers_are_refused(tmp_path):
    for document in ([], {"results": {}}, {"results": {"v": [1]}, "class": ["a", "b"]}):
        (tmp_path / "c.json").write_text(json.dumps(document))
        with pytest.raises(TensorkeepError):
            read_classifier(tmp_path / "c.json")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "narrow.npy", np.zeros((3, 5)))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name in ("objects.npy", "narrow.npy", "cut.npy"):
        with pytest.raises(TensorkeepError):
            read_classifier(tmp_path / name)
