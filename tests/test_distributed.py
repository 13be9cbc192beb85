"""Several processes decide alike: errors, the wish to stop and evaluated numbers are everybody's or nobody's."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tensorkeep.errors import TensorkeepError
from tensorkeep.training import distributed, metrics
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.distributed import World, gathered, start, together, total
from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.waiting import first_works
from tests.helpers import refused
from tests.training import assert_same_run, dying, ranks, small_job

LOOP = Loop(updates=6, batch=5, log_every=1, save_every=2)


def test_alone_nothing_is_asked_of_anybody() -> None:
    world = World()
    assert total(world, 1, 2.5) == [1.0, 2.5] and gathered(world, "x") == ["x"] and world.first
    model = torch.nn.Linear(1, 1)
    assert distributed.parallel(model, world) is model


def test_a_device_that_is_not_here_is_an_error() -> None:
    if not torch.cuda.is_available():
        with refused(None, "no CUDA device"):
            start("cuda")


def test_ranks_agree(tmp_path: Path) -> None:
    """Sums, lists and errors; then a run whose two processes end alike in every case below."""

    def work(world: World) -> None:
        torch.set_num_threads(1)
        assert total(world, world.rank + 1, 0.5) == [3.0, 1.0]
        assert gathered(world, {"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
        with pytest.raises(TensorkeepError, match="only on one"):
            together(world, lambda: fails() if world.rank == 1 else None)
        asked_on_one(world, tmp_path / "asked")
        differing_evaluations(world, tmp_path / "evaluated")
        damaged(world, tmp_path / "asked")
        refused_on_one(world, tmp_path / "asked")

    assert ranks(2, work) == [0, 0]
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("asked", "evaluated")] == []


def fails() -> None:
    raise TensorkeepError("only on one")


def asked_on_one(world: World, run: Path) -> None:
    """The second rank alone is told to stop: both do, at the same step, and the checkpoint is there."""
    job = small_job()
    calls = 0

    def count(batch: dict[str, list[int]]) -> float:
        nonlocal calls
        calls += 1
        if calls == 4 and world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return len(batch["index"])

    outcome = fit(replace(job, count=count), run, LOOP, world=world)
    assert (outcome.reason, outcome.step) == ("interrupted", 3), outcome
    gathered(world, None)
    assert checkpoint.steps(run)[0] == 3


def differing_evaluations(world: World, run: Path) -> None:
    """Numbers that differ between ranks: the first rank's decide, for the early stop too."""
    values = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0] if world.first else [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    job = replace(small_job(), evaluate=lambda model: {"mAP": next(values)})
    loop = replace(LOOP, evaluate_every=1, best="mAP", patience=2)
    outcome = fit(job, run, loop, world=world)
    assert (outcome.reason, outcome.step, outcome.evaluation) == ("stopped early", 3, {"mAP": 0.3})


def damaged(world: World, run: Path) -> None:
    """The newest checkpoint is damaged: both go on from the one before."""
    if world.first:
        path = run / "checkpoints/step-000003/model.safetensors"
        path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    gathered(world, None)
    outcome = fit(small_job(), run, LOOP, world=world)
    assert (outcome.reason, outcome.step, outcome.level) == ("done", 6, "exact")


def refused_on_one(world: World, run: Path) -> None:
    """A recipe that differs on one rank only stops both, and so does a job that is not the saved one on one rank."""
    job = small_job()
    recipe = job.recipe if world.first else {"training": {"lr": 2.0}}
    with pytest.raises(TensorkeepError, match=r"rank 1 on .* has another recipe than rank 0"):
        fit(replace(job, recipe=recipe), run, LOOP, world=world)
    loop = LOOP if world.first else replace(LOOP, batch=LOOP.batch * 2)
    with pytest.raises(TensorkeepError, match="not the one that was saved"):
        fit(job, run, loop, world=world)


def test_two_processes_that_died_end_bitwise_where_they_would_have(tmp_path: Path) -> None:
    """Each rank has dropout of its own; all of it comes back."""

    def run(folder: Path, death: int) -> None:
        def work(world: World) -> None:
            torch.manual_seed(50 + world.rank)
            job = dying(small_job(evaluate=True), death if world.first else 0)
            fit(job, folder, replace(LOOP, micro=1, evaluate_every=3), world=world)

        assert any(ranks(2, work)) == bool(death)

    run(tmp_path / "whole", 0)
    run(tmp_path / "parts", 8)
    assert metrics.METRICS in {p.name for p in (tmp_path / "parts").iterdir()}
    run(tmp_path / "parts", 0)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_long_work_of_the_first_rank_is_waited_for_outside_of_collectives() -> None:
    def work(world: World) -> None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

        def long() -> str:
            time.sleep(2.5)  # longer than a collective of this group may take
            return "made"

        def failing() -> str:
            raise TensorkeepError("no such file", where="here")

        assert first_works(world, long) == "made"
        with pytest.raises(TensorkeepError, match="no such file"):
            first_works(world, failing)

    assert ranks(2, work) == [0, 0]
