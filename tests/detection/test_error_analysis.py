import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tensorkeep.detection.results.error_analysis import KINDS, analyse_errors
from tensorkeep.detection.results.evaluation import evaluate
from tensorkeep.errors import TensorkeepError
from tests.detection.test_evaluation import annotate, detect

TRUTH = annotate([("v", 0, 10, "x"), ("v", 50, 60, "y")])


def kind_of(*rows):
    """The kinds of x's detections, best first: x has one annotated segment, so each is a block of its own."""
    got = analyse_errors(TRUTH, detect(rows), best=len(rows))
    return [KINDS[int(row.argmax())] for row in got.kinds]


@pytest.mark.parametrize(
    "start,end,kind",
    [
        (0, 9, "true positive"),
        (0, 3, "localisation"),
        (50, 59, "wrong label"),
        (50, 53, "confusion"),
        (30, 31, "background"),
    ],
)
def test_each_kind_is_told_from_the_segment_overlapped_most(start, end, kind):
    assert kind_of(("v", start, end, "x", 0.9))[0] == kind


def test_a_second_hit_on_a_segment_is_a_double_detection():
    assert kind_of(("v", 0, 10, "x", 0.9), ("v", 0, 9, "x", 0.8)) == ["true positive", "double detection"]


def test_what_is_missed_is_counted_by_length_coverage_and_crowding():
    got = analyse_errors(TRUTH, detect([("v", 0, 10, "x", 0.9)]))
    assert {row[0] for row in got.missed} == {"length s", "coverage", "same class in video"}
    for what in ("length s", "coverage", "same class in video"):
        rows = [row for row in got.missed if row[0] == what]
        assert sum(row[2] for row in rows) == 2
        assert sum(row[2] * row[3] for row in rows) == pytest.approx(1)


def test_what_a_kind_costs_is_what_the_map_gains_without_its_detections():
    rng = np.random.default_rng(0)
    truth = annotate([("v", 20 * n, 20 * n + 9, "xy"[n % 2]) for n in range(12)])
    starts = rng.uniform(0, 240, 60)
    rows = [("v", s, s + 9, "xy"[i % 2], float(rng.random())) for i, s in enumerate(starts)]
    rows += [("v", 20 * n + 1, 20 * n + 10, "xy"[n % 2], float(rng.random())) for n in range(9)]
    got = analyse_errors(truth, detect(rows), best=99)
    whole = evaluate(truth, detect(rows), thresholds=[0.5])
    assert got.map == pytest.approx(whole.average) and got.gains[0] == 0
    assert [row.ap for row in got.classes] == pytest.approx(whole.ap[:, 0])
    alone = {row: KINDS[int(np.argmax(analyse_errors(truth, detect([row]), best=1).kinds[0]))] for row in rows}
    for kind in ("background", "localisation", "wrong label", "confusion"):  # these are so whatever else is found
        without = evaluate(truth, detect([row for row in rows if alone[row] != kind]), thresholds=[0.5])
        assert got.gains[KINDS.index(kind)] == pytest.approx(without.average - whole.average, abs=1e-12)
    assert max(got.gains) > 0.01


def test_classes_count_their_best_detections_and_missed_segments():
    got = analyse_errors(TRUTH, detect([("v", 0, 10, "x", 0.9), ("v", 30, 31, "x", 0.95), ("v", 50, 60, "x", 0.1)]))
    x, y = got.classes
    assert (x.label, x.segments, x.missed, x.ap) == ("x", 1, 0, 0.5)
    assert dict(zip(KINDS, x.kinds)) == dict.fromkeys(KINDS, 0) | {"background": 1}  # one segment: its best detection
    assert (y.segments, y.missed, y.ap, sum(y.kinds)) == (1, 1, 0.0, 0)


def test_shares_of_a_block_add_up_to_one():
    got = analyse_errors(TRUTH, detect([("v", s, s + 9, "xy"[s % 2], s / 50) for s in range(40)]))
    np.testing.assert_allclose(got.kinds.sum(axis=1), 1)


def test_the_picture_is_well_formed_and_the_document_is_json():
    got = analyse_errors(TRUTH, detect([("v", 0, 10, "x", 0.9)]))
    assert ElementTree.fromstring(got.picture()).tag.endswith("svg")
    assert json.loads(json.dumps(got.document()))["kinds"][0]["true positive"] == 1
    assert got.table()[0][1:] == list(KINDS)


def test_an_overlap_below_background_is_refused():
    with pytest.raises(TensorkeepError):
        analyse_errors(TRUTH, detect([("v", 0, 10, "x", 0.9)]), tiou=0.05)
