"""Asked to stop, a run saves and leaves, wherever it is; asked again, it leaves at once. Nothing it did is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.training import interruption
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.interruption import ASKING, Interrupted, Wish, listening
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Saver
from tests.run_states import in_child
from tests.training import Noisy, assert_same_run, small_job

LOOP = Loop(updates=10, batch=5, save_every=4, evaluate_every=4, log_every=1)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, so nothing need wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Asking:
    """A function that asks the run to stop in its n-th call, then does its work."""

    def __init__(self, real: Any, at: int, number: int = signal.SIGTERM) -> None:
        self.real, self.left, self.number = real, at, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return self.real(*args, **kwargs)


def make() -> Job:
    return small_job(evaluate=True)


def goes_on_exactly(tmp_path: Path) -> None:
    fit(make(), tmp_path / "whole", LOOP)
    fit(make(), tmp_path / "parts", LOOP)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number", ASKING)
def test_in_an_update_it_finishes_the_update_saves_and_leaves(number: int, tmp_path: Path) -> None:
    job = make()
    outcome = fit(replace(job, loss=Asking(job.loss, 7, number)), tmp_path / "parts", LOOP)
    assert (outcome.reason, outcome.step) == ("interrupted", 7)
    assert checkpoint.steps(tmp_path / "parts")[0] == 7
    goes_on_exactly(tmp_path)


def test_in_a_save_it_finishes_the_save_and_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        asking = Asking(Saver.save, 1)
        patched.setattr(Saver, "save", lambda *args: asking(*args))
        outcome = fit(make(), tmp_path / "parts", replace(LOOP, evaluate_every=None))
    assert (outcome.reason, outcome.step) == ("interrupted", 4)
    assert checkpoint.steps(tmp_path / "parts") == [4]


def test_in_an_evaluation_it_leaves_at_once_and_evaluates_after_the_resume(tmp_path: Path) -> None:
    job, ended = make(), []

    def evaluate(model: torch.nn.Module) -> Mapping[str, float]:
        try:
            signal.raise_signal(signal.SIGTERM)
            ended.append(True)
        except Exception:  # an evaluation that guards itself against anything
            ended.append(True)
        return {"error": 0.0}

    before = {name: t.clone() for name, t in job.model.state_dict().items()}
    outcome = fit(replace(job, evaluate=evaluate), tmp_path / "parts", LOOP)
    assert (outcome.reason, outcome.step, outcome.evaluation, ended) == ("interrupted", 4, {}, [])
    assert job.model.training and not all(torch.equal(before[n], t) for n, t in job.model.state_dict().items())
    state = checkpoint.load(tmp_path / "parts/checkpoints/step-000004")
    assert all(torch.equal(state.model[n], t) for n, t in job.model.state_dict().items())  # not left with the average
    goes_on_exactly(tmp_path)


def test_before_the_first_update_there_is_nothing_to_save(tmp_path: Path) -> None:
    job = make()
    outcome = fit(replace(job, collate=Asking(job.collate, 1)), tmp_path / "parts", LOOP)
    assert (outcome.reason, outcome.step) == ("interrupted", 0)
    assert checkpoint.steps(tmp_path / "parts") == []
    goes_on_exactly(tmp_path)


def test_after_the_last_update_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make()
    loop = replace(LOOP, evaluate_every=None)
    outcome = fit(replace(job, evaluate=None, loss=Asking(job.loss, 10)), tmp_path, loop)
    assert (outcome.reason, outcome.step) == ("done", 10)


def test_it_asks_the_processes_that_fetch_nothing(tmp_path: Path) -> None:
    """A terminal or Slurm sends the signal to everybody: the run still gets its samples, saves and leaves."""

    def work() -> None:
        torch.set_num_threads(1)
        os.setpgid(0, 0)
        job = make()
        calls = 0

        def loss(model: torch.nn.Module, batch: Any, divisor: float) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)  # whoever is to die of it is dead by now
            return job.loss(model, batch, divisor)

        outcome = fit(replace(job, loss=loss), tmp_path, replace(LOOP, workers=2))
        assert (outcome.reason, outcome.step) == ("interrupted", 3)

    assert in_child(work) == 0
    assert checkpoint.steps(tmp_path) == [3]


def test_a_second_signal_leaves_at_once_but_an_echo_does_not(tmp_path: Path) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        interruption.ECHO = 0.2
        job = make()

        def loss(model: torch.nn.Module, batch: Any, divisor: float) -> Any:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # the launcher passes on what the terminal sent
            (tmp_path / "echo").touch()
            time.sleep(0.3)
            signal.raise_signal(signal.SIGTERM)
            (tmp_path / "still here").touch()
            return job.loss(model, batch, divisor)

        fit(replace(job, loss=loss), tmp_path / "run", LOOP)

    assert in_child(work) == 128 + signal.SIGTERM
    assert (tmp_path / "echo").exists() and not (tmp_path / "still here").exists()
    assert fit(make(), tmp_path / "run", LOOP).reason == "done"  # the lock went with it


def test_former_handlers_come_back_after_an_error_too() -> None:
    before = [signal.getsignal(number) for number in ASKING]
    with pytest.raises(RuntimeError), listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise RuntimeError
    assert [signal.getsignal(number) for number in ASKING] == before


def test_a_wish_from_before_stops_what_may_stop() -> None:
    wish = Wish()
    wish.ask(signal.SIGTERM)
    with pytest.raises(Interrupted), wish.may_stop():
        raise AssertionError
    assert not isinstance(Interrupted(), Exception)


def test_outside_the_main_thread_a_run_trains_without_listening(tmp_path: Path) -> None:
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(fit(make(), tmp_path, LOOP)))
    thread.start()
    thread.join()
    assert outcomes[0].reason == "done" and len(Noisy()) == 23
