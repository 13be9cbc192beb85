"""Ranks are killed under torchrun's own agent, which starts all of them again: the run goes on by itself, bit for bit.

The long form, over 2 and 4 ranks and changing numbers of them, is `benchmarks/kill_ranks.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.kill_ranks import Killer, Plan
from torch.distributed import HashStore, PrefixStore, Store

from tensorkeep.errors import TensorkeepError
from tensorkeep.output import Output
from tensorkeep.storage.run_folder import locked
from tensorkeep.training import distributed
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tests.run_states import in_child
from tests.training import assert_same_run, small_job

LOOP = Loop(updates=4, batch=4, save_every=2, log_every=1)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def make(device: str | torch.device = "cpu") -> Job:
    return small_job(evaluate=True)


def test_killed_ranks_are_started_again_and_the_end_is_bitwise_the_same(tmp_path: Path) -> None:
    plan = Plan("small", (2,), "fsdp", make, updates=8, best="-error")
    count = Killer(plan, kills=1, seed=1, longest=0.3, place=tmp_path).campaign()
    assert count.kills == 1
    assert (count.stuck, count.lost, count.different, count.rows_wrong) == (0, 0, 0, 0), count


def test_the_ranks_of_a_start_agree_on_a_word_whatever_a_start_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among it the words of a first rank that is gone, and of one that died between its coming and the answer."""
    store, found = HashStore(), dict[int, Store]()
    store.set("first", json.dumps(["old", ["old", "one", "two"]]))
    for rank, word in ((1, "one"), (2, "two")):
        store.set(f"here/{rank}", word)
        store.set(f"old/host/{rank}", "gone")
    PrefixStore("old", store).add("came", 3)
    monkeypatch.setattr(distributed, "_PAUSE", 0.001)

    def come(rank: int) -> None:
        found[rank] = distributed._agreed(store, rank, 3, 20.0)
        found[rank].set(f"mine/{rank}", "1")

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (1, 0, 2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 3 and all(one.check([f"mine/{rank}" for rank in range(3)]) for one in found.values())
    assert not any(store.check([f"{word}/mine/0"]) for word in ("old", "one", "two"))
    with pytest.raises(TensorkeepError, match="rank 1, 2 of 3 did not come within 0 seconds"):
        distributed._agreed(HashStore(), 0, 3, 0.01)


def started(monkeypatch: pytest.MonkeyPatch, restart: int, job: str = "job") -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))


def test_a_restart_goes_on_whatever_resume_said_of_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, 0)
    fit(make(), tmp_path / "run", replace(LOOP, updates=2), "never")
    started(monkeypatch, 1)
    outcome = fit(make(), tmp_path / "run", LOOP, "never", allow=("updates",), say=Output())
    assert outcome.level == "exact" and outcome.step == 4
    words = capsys.readouterr().err
    assert "torchrun has started this job's processes again, restart 1" in words
    assert "--resume never was for the first start" in words and "resumed from step-000002" in words
    fit(make(), tmp_path / "whole", replace(LOOP, updates=2))
    fit(make(), tmp_path / "whole", LOOP, allow=("updates",))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_restart_after_never_was_refused_does_not_take_another_jobs_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, 0, "earlier")
    fit(make(), tmp_path / "run", replace(LOOP, updates=2), "never")
    for restart in (0, 1):
        started(monkeypatch, restart)
        with pytest.raises(TensorkeepError, match="holds checkpoints already"):
            fit(make(), tmp_path / "run", LOOP, "never", allow=("updates",))


@pytest.mark.parametrize("restart", [0, 1])
def test_a_restart_waits_for_the_lock_of_a_process_that_is_about_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: int
) -> None:
    started(monkeypatch, restart)
    gone = threading.Timer(0.4, lambda: None)

    def train() -> None:
        fit(make(), tmp_path, replace(LOOP, updates=1))

    def held(then: Callable[[], int]) -> int:
        with locked(tmp_path):
            timer = threading.Thread(target=lambda: found.append(then()))
            timer.start()
            gone.start()
            gone.join()
        timer.join()
        return found[0]

    found: list[int] = []
    assert held(lambda: in_child(train)) == (0 if restart else 3)
