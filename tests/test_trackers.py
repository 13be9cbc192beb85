"""Trackers go on in the same run and get every row once, through kills."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tensorkeep.training import metrics, trackers
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tests.helpers import refused
from tests.tools import ROOT
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


class Local:
    """A stand-in for trackio, which keeps what it has sent: the last rows before a kill are lost with the process."""

    def __init__(self) -> None:
        self.stored: dict[str, list[dict[str, Any]]] = {}

    def init(self, project: str, name: str, resume: str, embed: bool) -> Any:
        assert (resume, embed) == ("allow", False)
        print("* what must not come between data on stdout")
        waiting: list[dict[str, Any]] = []
        stored = self.stored.setdefault(name, [])

        class Run:
            def log(self, row: dict[str, Any], step: int) -> None:
                waiting.append({**row, "step": step})
                if len(waiting) > 2:
                    stored.append(waiting.pop(0))

        self.current = (stored, waiting)
        return Run()

    def finish(self) -> None:
        print("* Run finished.")
        stored, waiting = self.current
        stored.extend(waiting)

    def held(self, project: str, name: str) -> list[dict[str, Any]]:
        return self.stored.get(name, [])


def test_trackio_is_given_what_a_kill_made_it_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service, ends = Local(), list[Any]()
    monkeypatch.setattr(trackers.atexit, "register", ends.append)
    killed_twice(lambda: trackers.trackio(tmp_path, "mine", service, service.held), tmp_path)
    ends[-1]()  # of the start that was not killed
    (held,) = service.stored.values()
    assert sorted(("evaluation" if "evaluation/error" in r else "update", r["step"]) for r in held) == sorted(WANTED)
    assert capsys.readouterr().out == ""


# -- the real packages, each start of the run a process of its own ----------------------------------------------------

STARTS = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path += [p for p in os.environ.get("TRACKERS_PATH", "").split(":") if p]  # where they are installed elsewhere
import torch
from tensorkeep.training import trackers
from tensorkeep.training.loop import fit
from tests.test_trackers import LOOP
from tests.training import Died, dying, small_job
torch.set_num_threads(1)
run, kind, death = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
made = {"tensorboard": trackers.tensorboard, "trackio": lambda run: trackers.trackio(run, "mine"),
        "wandb": lambda run: trackers.wandb(run, "mine", mode="offline")}[kind](run)
try:
    fit(dying(replace(small_job(evaluate=True), trackers=[made]), death), run, LOOP)
except Died:
    os._exit(1)
"""


def told(
    kind: str, run: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...] = (6,)
) -> list[tuple[int, dict[str, float]]]:
    """The rows of a run's metrics.jsonl, as numbers under the names that trackers are given."""
    for part in os.environ.get("TRACKERS_PATH", "").split(":"):
        if part:
            monkeypatch.syspath_prepend(part)
            sys.path.append(sys.path.pop(0))  # after this environment's own
    pytest.importorskip(kind, reason=f"{kind} is not installed")
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "WANDB_SILENT": "true"}
    for death, code in (*((kill, 1) for kill in kills), (0, 0)):
        done = subprocess.run(
            [sys.executable, "-c", STARTS, run, kind, str(death)], env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
    rows = list(metrics.rows(run / metrics.METRICS))
    assert sorted(("evaluation" if "evaluation" in r else "update", r["step"]) for r in rows) == sorted(WANTED)
    return sorted(((row["step"], without_time(dict(trackers.scalars(row)))) for row in rows), key=str)


def without_time(row: dict[str, Any]) -> dict[str, float]:
    """A row as a tracker holds it, without its own fields; made twice, its seconds are those of the first time."""
    return {k: v for k, v in row.items() if "/" in k and k not in ("train/seconds", "train/step")}


def test_the_real_tensorboard_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = told("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found: dict[tuple[int, str], float] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (event.step, name) not in found
            found[event.step, name] = event.value
    numbers = {(step, name): value for step, row in wanted for name, value in row.items()}
    assert {key for key in found if key[1] != "train/seconds"} == {*numbers}
    for key, value in numbers.items():  # its files have numbers of 32 bits
        assert found[key] == torch.tensor(value, dtype=torch.float32).item()


def logged(data: bytes) -> Iterator[bytes]:
    """The records of a W&B run's file: LevelDB's log format, of which the first 7 bytes are W&B's own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no head of a part begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_the_real_wandb_holds_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = told("wandb", tmp_path, monkeypatch, kills=())  # a kill loses what W&B has not written yet
    from wandb.proto.wandb_internal_pb2 import Record

    rows, names = [], set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in logged(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                names.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert names == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    assert sorted(((row["step"], without_time(row)) for row in rows), key=str) == wanted


def test_the_real_trackio_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    wanted = told("trackio", tmp_path / "run", monkeypatch)
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    rows = SQLiteStorage.get_logs("mine", name)
    assert sorted(((row["step"], without_time(row)) for row in rows), key=str) == wanted
