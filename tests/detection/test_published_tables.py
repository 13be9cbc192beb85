"""Published detections give the published mean average precision, to the printed digits."""

import json
import os
from pathlib import Path

import pytest

from tensorkeep.detection.results.evaluation import evaluate_files

FOLDER = Path(os.environ.get("TENSORKEEP_DETECTIONS", Path(__file__).parents[3] / "shared" / "fixtures" / "detections"))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "expected.json").is_file(),
    reason=f"no published detections at {FOLDER} (TENSORKEEP_DETECTIONS names the folder)",
)


@pytest.fixture(scope="module")
def expected():
    return json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("threshold", ["0.1", "0.2", "0.3", "0.4", "0.5"])
def test_scnn_on_thumos_with_the_kits_protocol(expected, threshold):
    want = expected["S-CNN"]["by_tiou"][threshold]
    got = evaluate_files(
        FOLDER / "thumos14_test", FOLDER / want["file"], protocol="thumos14", thresholds=[float(threshold)]
    )
    assert round(100 * got.average, 1) == want["published"]
    assert round(100 * got.average, 4) == want["mAP"]
    per_class = {name: round(100 * row[0], 4) for name, row in zip(got.classes, got.ap, strict=True)}
    assert per_class == pytest.approx(want["per_class_AP"], abs=1e-4)
    assert (sum(got.segments), got.detections) == (3358, want["n_det"])


def test_mmactions_toy_case_with_the_activitynet_protocol(expected):
    folder, want = FOLDER / "mmaction2_toy", expected["mmaction2_toy"]
    got = evaluate_files(folder / "gt.json", folder / "result.json")
    assert [round(value, 8) for value in got.map.tolist()] == want["mAP"]
    assert got.average == pytest.approx(want["average"], abs=1e-12)
