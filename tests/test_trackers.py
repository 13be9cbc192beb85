"""Trackers go on in the same run and get every row once, through kills."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tensorkeep.training import trackers
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tests.helpers import refused
from tests.training import Died, dying, small_job

LOOP = Loop(updates=8, batch=5, save_every=3, log_every=1, evaluate_every=4)
WANTED = [*(("update", s) for s in range(1, 9)), ("evaluation", 4), ("evaluation", 8)]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Board:
    """A stand-in for SummaryWriter: points by name, and a purge of steps that come again."""

    points: ClassVar[dict[tuple[str, int], list[float]]] = {}

    def __init__(self, log_dir: str, purge_step: int) -> None:
        for key in [k for k in self.points if k[1] >= purge_step]:
            del self.points[key]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points.setdefault((name, step), []).append(value)

    def flush(self) -> None: ...


class Service:
    """A stand-in for wandb: runs by id, each with the rows it was given."""

    def __init__(self) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}

    def init(self, project: str, dir: str, id: str | None, resume: str) -> Any:
        assert resume == "allow"
        name = id or f"id-{len(self.runs)}"
        rows = self.runs.setdefault(name, [])

        class Run:
            id = name

            def log(self, row: dict[str, Any]) -> None:
                rows.append(row)

        return Run()


def killed_twice(make: Any, run: Path) -> None:
    for death in (6, 4, 0):
        job = small_job(evaluate=True)
        try:
            fit(dying(replace(job, trackers=[make()]), death), run, LOOP)
        except Died:
            continue


def test_tensorboard_holds_every_point_once(tmp_path: Path) -> None:
    Board.points = {}
    killed_twice(lambda: trackers.tensorboard(tmp_path, Board), tmp_path)
    assert sorted(s for n, s in Board.points if n == "train/loss") == list(range(1, 9))
    assert sorted(s for n, s in Board.points if n == "evaluation/error") == [4, 8]
    assert all(len(values) == 1 for values in Board.points.values())


def test_wandb_goes_on_in_one_run_and_hears_every_row_once(tmp_path: Path) -> None:
    service = Service()
    killed_twice(lambda: trackers.wandb(tmp_path, "mine", service), tmp_path)
    assert list(service.runs) == ["id-0"]
    heard = [("evaluation" if "evaluation/error" in r else "update", r["step"]) for r in service.runs["id-0"]]
    assert sorted(heard) == sorted(WANTED)


def test_a_file_of_somebody_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('{"last": {"update": "x"}}')
    with refused(None, "not what a tracker wrote"):
        trackers.wandb(tmp_path, "mine", Service())


def test_the_real_tensorboard_takes_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    killed_twice(lambda: trackers.tensorboard(tmp_path), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))


def test_the_real_wandb_takes_the_rows_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    killed_twice(lambda: trackers.wandb(tmp_path, "mine", mode="offline"), tmp_path)
    assert (tmp_path / "trackers.json").exists()
