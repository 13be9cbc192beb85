"""Suppression and evaluation equal the original's, on the fixtures small enough to lie in the repository."""

from pathlib import Path

from tests.parity.opentad_post import cases

FOLDER = Path(__file__).parents[1] / "data" / "opentad"


def test_every_fixture_is_met_within_its_tolerance():
    found = list(cases(FOLDER))
    assert {name.split("/")[0] for name, _, _ in found} >= {"nms", "map_thumos", "map_anet_blocked", "map_ties"}
    assert [case for case in found if not case[1] <= case[2]] == []
