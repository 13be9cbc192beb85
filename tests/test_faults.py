"""Diagnosis by faults made on purpose: each kind once, on a model that can have it; sound variants give no error.

The whole table is `python -m benchmarks.faults`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.diagnosis.diagnosis import diagnose
from tests.faults import KINDS, Fault, has_permutation, judge, make
from tests.parity.sick import cases, expected_code
from tests.sound import every
from tests.specimens import CONFIGS, specimen
from tests.tools import SHARED

MODELS = [*CONFIGS, "vit"]
SICK = SHARED / "fixtures/conversion/open"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def first_fit(kind: str, work: Path) -> Fault:
    """The kind on the first model that can have it, beginning at another model for each kind."""
    start = sorted(KINDS).index(kind)
    made = (make(kind, MODELS[(start + i) % len(MODELS)], 0, work) for i in range(len(MODELS)))
    return next(fault for fault in made if fault is not None)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_cause_is_named(kind: str, work: Path) -> None:
    fault = first_fit(kind, work)
    document = diagnose(str(fault.path), str(fault.reference), fault.target).to_json()  # type: ignore[arg-type]
    verdict, why = judge(fault, document)
    assert verdict == "named", f"{fault.model}, {fault.note}: {why}"


@pytest.mark.parametrize("model", ["llama_bias", "qwen3", "vit"])
def test_sound_checkpoints_give_no_error(model: str, work: Path) -> None:
    alarms = []
    for sound in every(model, work):
        found = diagnose(str(sound.path), str(sound.reference) if sound.reference else None, sound.target)  # type: ignore[arg-type]
        alarms += [f"{sound.variant}: {f.code} {f.message}" for f in found.findings if f.severity == "error"]
    assert alarms == []


@pytest.mark.skipif(not SICK.exists(), reason="the conversion fixtures are not at hand")
def test_the_sick_folders_pass() -> None:
    failed = [outcome.line for outcome in cases(SICK) if not outcome.figure <= outcome.tolerance]
    assert failed == []


# -- the generator itself -------------------------------------------------------------------------------------------


def test_there_are_kinds_enough_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    assert len(KINDS) >= 40
    one, two = (make("rope_some_layers", "olmo2", 5, tmp_path / word) for word in ("a", "b"))
    assert one and two and (one.tensors, one.note) == (two.tensors, two.note)
    files = [sorted(p.relative_to(f.path) for p in f.path.rglob("*")) for f in (one, two)]
    assert files[0] == files[1]


@pytest.mark.parametrize("model", MODELS)
def test_specimens_have_no_value_of_a_fresh_model(model: str) -> None:
    m = specimen(model)
    for name in m.norms:
        assert np.abs(m.tensors[name].astype(np.float32) - 1).max() > 0.1
    for name in m.matrices:
        rows = np.linalg.norm(m.tensors[name].astype(np.float32), axis=1)
        assert rows.std() / rows.mean() > 0.12  # of N(0, s) with 64 columns: 0.09


def answer(code: str, tensors: list[str], causes: list[str], **own: Any) -> dict[str, Any]:
    finding = {
        "code": code,
        "severity": "error",
        "tensors": tensors,
        "count": len(tensors),
        "message": "",
        "evidence": {},
        "explains": [],
    }
    return {"verdict": "findings", "causes": causes, "findings": [finding | own]}


def test_the_judge_wants_code_tensors_and_silence_otherwise(work: Path) -> None:
    fault = make("norm_ones", "olmo2", 1, work)
    assert fault is not None and fault.tensors is not None
    names = sorted(fault.tensors)
    assert judge(fault, answer("V04", names, ["V04"]))[0] == "named"
    assert judge(fault, answer("V04", [*names, "x"], ["V04"]))[0] == "wrong"
    assert judge(fault, answer("V06", names, ["V06"]))[0] == "wrong"
    assert judge(fault, {"verdict": "ok", "causes": [], "findings": []})[0] == "missed"
    both = answer("V04", names, ["V04"])
    both["findings"] += answer("V06", ["x"], [])["findings"]
    assert judge(fault, both)[0] == "wrong"
    both["findings"][0]["explains"] = ["V06"]
    assert judge(fault, both)[0] == "named"


def test_permutations_are_found_in_evidence_either_way_round() -> None:
    assert has_permutation({"layers": [1, 2, 0]}, [1, 2, 0])
    assert has_permutation({"layers": [2, 0, 1]}, [1, 2, 0])
    assert has_permutation({"order": {"0": 1, "1": 0}}, [1, 0, 2])
    assert not has_permutation({"layers": [0, 2, 1]}, [1, 2, 0])


def test_faults_of_other_sick_folders_are_known_by_name() -> None:
    words = {
        "prefix:_orig_mod.": "K03",
        'prefix:model. (nested {"model": sd})': "K04",
        "vocab_padded_100_to_128": "S02",
        "none": None,
    }
    assert {w: expected_code(w) for w in words} == words
