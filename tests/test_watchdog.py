"""A run that does not get on ends by itself: stacks of every process, words on who was at what, exit code 75."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.errors import TEMPORARY, TensorkeepError
from tensorkeep.training import watchdog
from tensorkeep.training._heartbeats import Standing, judged
from tensorkeep.training.distributed import World, peers_named
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tests.run_states import in_child
from tests.training import assert_same_run, ranks, small_job

LIMIT = 1.0  # seconds
LOOP = Loop(updates=6, batch=4, log_every=1, save_every=2, watchdog=LIMIT)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def halting(job: Job, at: int, halt: Callable[[], None]) -> Job:
    """The job, whose data halts in its `at`-th sample (from 1)."""
    real, calls = job.data.sample, 0

    def sample(index: int, generator: torch.Generator) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            halt()
        return real(index, generator)

    job.data.sample = sample  # type: ignore[method-assign]
    return job


def for_ever() -> None:
    """Stand for a deadlock: nothing is computed."""
    while True:
        time.sleep(60)


def once_known(number: int) -> None:
    """Send this process a signal, when the others have heard of it."""
    time.sleep(0.6)
    os.kill(os.getpid(), number)


def said_by(work: Callable[[], None], path: Path) -> Callable[[World], None]:
    """The work of a rank, whose words on stderr go to a file."""

    def told(world: World) -> None:
        own = os.open(path.with_suffix(f".{world.rank}"), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(own, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        work(world)  # type: ignore[call-arg]

    return told


@pytest.mark.parametrize(
    ("victim", "halt"), [(1, "deadlock"), (1, "SIGSTOP"), (0, "SIGSTOP")], ids=["deadlock", "stopped", "first stopped"]
)
def test_a_hung_rank_ends_all_of_them_with_their_stacks_and_its_name(tmp_path: Path, victim: int, halt: str) -> None:
    """Rank 0 keeps the store here, so that where it is stopped not even the store answers."""

    def work(world: World) -> None:
        job = small_job(dropout=0.0)
        if world.rank == victim:
            stop = (lambda: os.kill(os.getpid(), signal.SIGSTOP)) if victim else lambda: once_known(signal.SIGSTOP)
            job = halting(job, 7, for_ever if halt == "deadlock" else stop)
        fit(job, tmp_path / "run", LOOP, world=world)

    found = ranks(2, said_by(work, tmp_path / "said"), seconds=30.0)
    other = 1 - victim
    assert found[other] == TEMPORARY and found[victim] == (TEMPORARY if halt == "deadlock" else -signal.SIGKILL)
    words = "".join((tmp_path / "said").with_suffix(f".{rank}").read_text() for rank in (0, 1))
    stacks = tmp_path / "run" / "stacks"
    assert "fit" in (stacks / f"rank-{other:04}.txt").read_text() and str(stacks / f"rank-{other:04}.txt") in words
    if halt == "deadlock":
        assert "no process has got on for" in words and "rank 1 on" in words and "at data of update 4, for" in words
        assert "for_ever" in (stacks / "rank-0001.txt").read_text()
        assert "at update 4, for" in words  # rank 0, in the sum over the ranks
    elif victim:
        assert "rank 1 on" in words and "has not answered for" in words and "no stacks" in words
    else:
        assert "has not answered for" in words and "last heard of on" in words
    assert fit(small_job(dropout=0.0), tmp_path / "run", replace(LOOP, watchdog=None)).step == 6


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_rank_ends_the_others_soon_though_they_wait_where_no_connection_breaks(
    tmp_path: Path, victim: int
) -> None:
    """As under NCCL, whose kernels wait for a dead rank for ever; rank 0 keeps the store here, which dies with it."""

    def work(world: World) -> None:
        killed = world.rank == victim
        job = halting(small_job(dropout=0.0), 7, lambda: once_known(signal.SIGKILL) if killed else for_ever())
        fit(job, tmp_path / "run", replace(LOOP, watchdog=3.0), world=world)

    found = ranks(2, said_by(work, tmp_path / "said"), patience=30.0)
    assert found[victim] == -signal.SIGKILL and found[1 - victim] == TEMPORARY
    words = (tmp_path / "said").with_suffix(f".{1 - victim}").read_text()
    assert f"the process of rank {victim} on" in words and "is gone" in words
    if victim:
        assert "rank 1 on" in words and "its process is gone, last heard of at" in words
    assert fit(small_job(dropout=0.0), tmp_path / "run", replace(LOOP, watchdog=None)).step == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_one_process_alone_is_watched_as_well_and_those_that_fetch_its_data_show_their_stacks(
    tmp_path: Path, workers: int
) -> None:
    def work() -> None:
        fit(halting(small_job(), 9, for_ever), tmp_path / "run", replace(LOOP, workers=workers))

    assert in_child(work) == TEMPORARY
    text = (tmp_path / "run" / "stacks" / "rank-0000.txt").read_text()
    assert "has not got on for 1 s; at data of update 3" in text
    own, _, of_workers = text.partition("processes that fetch data (1):")
    assert "for_ever" in (of_workers if workers else own) and bool(of_workers) == bool(workers)


def test_long_work_is_no_hang_where_it_computes_reads_or_belongs_to_another_rank(tmp_path: Path) -> None:
    """An evaluation of more than a time-out on one rank, while the other waits; the run is that without a watchdog."""

    def work(folder: str, limit: float | None) -> Callable[[World], None]:
        def of_rank(world: World) -> None:
            job = small_job(evaluate=True)
            evaluate = job.evaluate
            assert evaluate is not None

            def slow(model: Any) -> Any:
                end = time.monotonic() + (1.5 * limit if world.rank == 1 and limit is not None else 0)
                while time.monotonic() < end:
                    sum(range(10**5))
                return evaluate(model)

            loop = replace(LOOP, updates=4, watchdog=limit)
            fit(replace(job, evaluate=slow), tmp_path / folder, loop, world=world)

        return of_rank

    assert ranks(2, work("watched", 2.0)) == [0, 0] and ranks(2, work("plain", None)) == [0, 0]
    assert_same_run(tmp_path / "watched", tmp_path / "plain")
    assert not (tmp_path / "watched" / "stacks").exists()


def test_a_process_that_was_stopped_and_goes_on_is_not_hung(tmp_path: Path) -> None:
    """Ctrl-Z and fg: no time has passed for it."""
    pid = os.fork()
    if not pid:
        with watchdog.watching(tmp_path, 0, 1, 0.8):
            watchdog.at("update", 1)
            (tmp_path / "begun").touch()
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)
        os._exit(7)
    os.waitpid(pid, os.WUNTRACED)
    time.sleep(1.6)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_what_is_busy_counts_and_what_is_not_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended: list[str] = []
    monkeypatch.setattr(watchdog.Watch, "_end", lambda self, why: (ended.append(why), self._over.set()))

    def spin(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(10**4))

    with watchdog.watching(tmp_path, 0, 1, 0.3), watchdog.doing("evaluation of step", 3):
        spin(0.9)
    assert ended == []
    with watchdog.watching(tmp_path, 0, 1, 0.3):
        watchdog.at("update", 1)
        spin(0.9)
    assert len(ended) == 1


def test_the_verdict_waits_for_ranks_that_are_on_their_way_and_forgets_those_that_left() -> None:
    known = {0: Standing("update 1", 9.0, "a", seen=10.0)}
    assert judged(known, 2, 5.0, 10.0) is None  # rank 1 still builds
    known[1] = Standing("end", 0.0, "b", left=True, seen=0.0)
    assert judged(known, 2, 5.0, 10.0) == "no process has got on for 9 s"
    known[0] = replace(known[0], idle=0.0)
    assert judged(known, 2, 5.0, 10.0) is None


def test_a_broken_connection_is_one_plain_error_and_other_errors_stay_what_they_are() -> None:
    broken = RuntimeError("[pair.cc:537] Connection closed by peer [::1]:5. This is typically caused by a bug")
    with pytest.raises(TensorkeepError) as caught, peers_named("run", World(1, 2)):
        raise broken
    assert caught.value.exit_code == TEMPORARY
    assert caught.value.what.startswith("rank 1 on ") and caught.value.what.endswith("closed by peer [::1]:5")
    for error, size in ((broken, 1), (RuntimeError("shapes do not fit"), 2)):
        with pytest.raises(RuntimeError) as plain, peers_named("run", World(0, size)):
            raise error
        assert plain.value is error
