"""Rows of a run: none twice, none missing, whatever a crash left at the end of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.training import metrics
from tests.helpers import refused


def write(path: Path, steps: list[int], tail: bytes = b"") -> Path:
    path.unlink(missing_ok=True)
    for step in steps:
        metrics.append(path, {"step": step, "loss": step / 3})
    with path.open("ab") as file:
        file.write(tail)
    return path


def steps(path: Path) -> list[int]:
    return [row["step"] for row in metrics.rows(path)]


@given(cut=st.integers(0, 200), step=st.integers(0, 6))
def test_a_file_cut_anywhere_gives_whole_rows_up_to_the_step(
    cut: int, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "m.jsonl", [1, 2, 3, 4, 5])
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")
    metrics.rewind(path, step)
    assert steps(path) == [s for s in range(1, whole + 1) if s <= step]
    metrics.append(path, {"step": 9})
    assert steps(path)[-1] == 9


@pytest.mark.parametrize(
    "tail", [b"\0" * 30, b'{"step": 4, "lo', b"\0\0\0\n", b'{"step": 4}garbage\n', b"[1]\n", b'{"step": "4"}\n']
)
def test_ruins_at_the_end_go(tail: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [1, 2, 3], tail)
    assert steps(path) == [1, 2, 3]
    assert metrics.rewind(path, 3) == 1
    assert path.read_bytes().count(b"\n") == 3


def test_ruins_amid_rows_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [1], b"somebody was here\n" + b'{"step": 2}\n')
    with refused(None, "line 2"):
        metrics.rewind(path, 5)


def test_rows_that_stay_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1,   "loss": 1e-3}\n{"step": 2}\n')
    metrics.rewind(path, 1)
    assert path.read_bytes() == b'{"step":1,   "loss": 1e-3}\n'


def test_numbers_that_json_lacks_become_null_however_deep(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics.append(path, {"step": 1, "loss": float("nan"), "evaluation": {"mAP": float("inf"), "ok": 0.1}})
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "evaluation": {"mAP": None, "ok": 0.1}}


def test_a_float_comes_back_to_the_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    metrics.append(tmp_path / "m.jsonl", {"step": 1, "loss": value})
    assert next(metrics.rows(tmp_path / "m.jsonl"))["loss"].hex() == value.hex()


def test_no_file_is_no_rows_and_a_rewind_makes_one(tmp_path: Path) -> None:
    assert steps(tmp_path / "m.jsonl") == []
    assert metrics.rewind(tmp_path / "m.jsonl", 0) == 0 and (tmp_path / "m.jsonl").read_bytes() == b""


def test_rows_of_two_runs_are_compared_without_what_the_machine_says(tmp_path: Path) -> None:
    for name, seconds, memory in (("one", 0.1, {"memory": 1.5}), ("two", 0.2, {"memory": 3.0}), ("old", 0.3, {})):
        metrics.append(tmp_path / name, {"step": 1, "loss": 0.5, "seconds": seconds, **memory})
        metrics.append(tmp_path / name, {"step": 1, "evaluation": {"loss": 0.4}})
    first = metrics.comparable(tmp_path / "one")
    assert first == metrics.comparable(tmp_path / "two") == metrics.comparable(tmp_path / "old")
    assert first == [{"step": 1, "loss": 0.5}, {"step": 1, "evaluation": {"loss": 0.4}}]
