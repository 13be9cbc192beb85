import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.results.nms import (
    METHODS,
    Detections,
    Suppression,
    from_opentad,
    suppress,
    suppress_videos,
    vote,
)
from tensorkeep.errors import TensorkeepError
from tests.detection import plain

SOFT = [method for method in METHODS if method != "greedy"]


def make(seed, number, classes=3, coarse=False):
    rng = np.random.default_rng(seed)
    centre, length = rng.uniform(0, 30, number), rng.gamma(2, 2, number)
    segments = np.stack([centre - length / 2, centre + length / 2], axis=1)
    scores = rng.uniform(0, 1, number)
    if coarse:  # equal scores, equal and empty segments
        segments, scores = np.round(segments / 3) * 3, np.round(scores, 1)
    return Detections(segments.astype(np.float32), scores.astype(np.float32), rng.integers(0, classes, number))


@pytest.mark.parametrize("method", SOFT)
@given(seed=st.integers(0, 2**20), number=st.integers(1, 40), min_score=st.sampled_from([0.0, 0.05, 0.3]))
@settings(deadline=None, max_examples=25)
def test_soft_suppression_equals_the_plain_loop_even_where_scores_tie(method, seed, number, min_score):
    found = make(seed, number, coarse=seed % 2 == 0)
    rule = Suppression(method, 0.4, 0.3, 0.2, 0.01, min_score, limit=1000, multiclass=False)
    want = plain.soft_nms(found.segments, found.scores, method, 0.4, 0.3, 0.2, 0.01, min_score)
    want.sort(key=lambda pair: -pair[1])
    kept = suppress(found, rule)
    np.testing.assert_allclose(kept.scores, [score for _, score in want], atol=1e-6)
    np.testing.assert_array_equal(kept.segments, found.segments[[index for index, _ in want]])


@given(seed=st.integers(0, 2**20), number=st.integers(1, 40), min_score=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=25)
def test_greedy_suppression_equals_the_plain_loop(seed, number, min_score):
    found = make(seed, number, coarse=seed % 2 == 0)
    rule = Suppression("greedy", iou=0.4, min_score=min_score, limit=1000, multiclass=False)
    want = plain.greedy_nms(found.segments, found.scores, 0.4, min_score)
    kept = suppress(found, rule)
    np.testing.assert_array_equal(kept.scores, [score for _, score in want])
    np.testing.assert_array_equal(kept.segments, found.segments[[index for index, _ in want]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("multiclass", [True, False])
def test_a_batch_of_videos_is_each_video_alone(method, multiclass):
    parts = [make(seed, number) for seed, number in enumerate([30, 1, 200, 7])]
    rule = Suppression(method, iou=0.3, min_score=0.02, limit=25, multiclass=multiclass, voting=0.6)
    videos = np.repeat(np.arange(4), [30, 1, 200, 7])
    shuffled = np.random.default_rng(0).permutation(len(videos))
    together = Detections(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    stable = np.argsort(videos[shuffled], kind="stable")
    inside = Detections(*(column[shuffled][stable] for column in together))
    kept, owners = suppress_videos(Detections(*(column[shuffled] for column in together)), videos[shuffled], rule)
    for video in range(4):
        own = np.flatnonzero(videos[shuffled][stable] == video)
        alone = suppress(Detections(*(column[own] for column in inside)), rule)
        for got, want in zip(kept, alone, strict=True):
            np.testing.assert_array_equal(got[owners == video], want)


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_keeps_the_best_of_the_unlimited(method):
    found = make(5, 120)
    everything = suppress(found, Suppression(method, iou=0.3, limit=1000))
    few = suppress(found, Suppression(method, iou=0.3, limit=20))
    for got, want in zip(few, everything, strict=True):
        np.testing.assert_array_equal(got, want[:20])


def test_multiclass_voting_moves_segments_by_their_own_class_only():
    segments = np.array([[0, 4], [1, 4], [0, 3]], dtype=np.float32)
    found = Detections(segments, np.array([0.9, 0.3, 0.6], dtype=np.float32), np.array([0, 0, 1]))
    kept = suppress(found, Suppression("greedy", iou=0.5, voting=0.5))
    np.testing.assert_allclose(kept.segments, [[0.25, 4], [0, 3]])


def test_class_agnostic_suppression_reaches_across_classes():
    found = Detections(np.array([[0, 4], [0, 4]], np.float32), np.array([0.9, 0.3], np.float32), np.array([0, 1]))
    assert len(suppress(found, Suppression("greedy", iou=0.5)).scores) == 2
    assert len(suppress(found, Suppression("greedy", iou=0.5, multiclass=False)).scores) == 1


def test_voting_leaves_a_segment_without_length_where_it_is():
    point = np.array([[2, 2]], dtype=np.float32)
    np.testing.assert_array_equal(vote(point, point, np.ones(1, np.float32), 0.5), point)


def test_nothing_found_stays_nothing():
    none = Detections(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert len(suppress(none, Suppression()).scores) == 0


def test_opentad_options_mean_what_they_do_there():
    rule = from_opentad(
        {"use_soft_nms": True, "sigma": 0.7, "max_seg_num": 2000, "multiclass": True, "voting_thresh": 0.7}
    )
    assert rule == Suppression("gaussian", sigma=0.7, limit=2000, multiclass=True, voting=None)  # ignored there
    assert from_opentad({"multiclass": False, "voting_thresh": 0.9}).voting == 0.9
    assert from_opentad({"use_soft_nms": False, "iou_threshold": 0.4}).method == "greedy"


@pytest.mark.parametrize("wrong", [{"method": "gauss"}, {"sigma": 0.0}, {"limit": 0}, {"voting": 0.0}, {"voting": 1.5}])
def test_rules_that_cannot_work_are_refused(wrong):
    with pytest.raises(TensorkeepError):
        Suppression(**wrong)


@pytest.mark.parametrize("wrong", [{"sgima": 1}, {"method": 7}, {"sigma": "a"}])
def test_unknown_opentad_options_are_refused(wrong):
    with pytest.raises(TensorkeepError):
        from_opentad(wrong)


@pytest.mark.parametrize("field,value", [("scores", -0.1), ("scores", np.nan), ("segments", np.inf)])
def test_impossible_detections_are_refused(field, value):
    found = make(1, 4)
    column = getattr(found, field).copy()
    column[0] = value
    with pytest.raises(TensorkeepError):
        suppress(found._replace(**{field: column}), Suppression())


def test_columns_of_different_length_are_refused():
    with pytest.raises(TensorkeepError, match="do not fit"):
        suppress(make(1, 4)._replace(labels=np.zeros(3, np.int64)), Suppression())


def test_rules_are_values():
    assert dataclasses.replace(Suppression(), sigma=0.7) == Suppression(sigma=0.7)
