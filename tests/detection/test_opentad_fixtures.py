"""Golden numbers of the original, from trimmed copies of its fixtures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.parity import opentad_model

DATA = Path(__file__).parents[1] / "data" / "opentad"
CASES = list(opentad_model.cases(DATA))


@pytest.mark.parametrize(("name", "figure", "tolerance"), CASES, ids=[case[0] for case in CASES])
def test_equals_the_original(name: str, figure: float, tolerance: float) -> None:
    assert math.isfinite(figure) and figure <= tolerance


def test_every_copied_file_is_recognised() -> None:
    seen = {case[0].split("/")[0] for case in CASES}
    assert seen >= {"detector_local_anet", "label_assignment", "losses", "ema", "pos_embed", "scheduler"}
