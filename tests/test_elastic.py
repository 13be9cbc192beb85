"""Another number of processes, the same global batches: 1 -> 2 -> 4 -> 1 and ragged ways, on CPUs through gloo."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorkeep.training.batches import Stream
from tensorkeep.training.distributed import World
from tensorkeep.training.job import Job, Loop
from tensorkeep.training.loop import fit
from tests.training import ranks, relative_l2, small_job

BATCH, LENGTH = 6, 23


def recording(job: Job, into: dict[int, list[int]]) -> Job:
    """The job, which notes the ids that this rank counts for each update."""
    held: list[int] = []

    def count(batch: Mapping[str, Any]) -> float:
        held.extend(batch["index"])
        return len(batch["index"])

    def schedule(update: int, base: float) -> float:
        into.setdefault(update, []).extend(held)
        held.clear()
        return job.schedule(update, base)

    return replace(job, count=count, schedule=schedule)


def phase(run: Path, ids: Path, size: int, until: int, **options: Any) -> None:
    """Go on with `size` processes until an update; each leaves the ids it used in a file."""

    def work(world: World) -> None:
        torch.set_num_threads(1)
        used: dict[int, list[int]] = {}
        loop = Loop(updates=until, batch=BATCH, micro=2, log_every=1, **options)
        outcome = fit(recording(small_job(dropout=0.0), used), run, loop, world=world, allow=("updates",))
        assert outcome.step == until and outcome.level in (None, "sample-exact")
        (ids / f"{until}-{world.rank}.json").write_text(json.dumps(used))

    assert ranks(size, work) == [0] * size


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (4, 2, 3, 1)])
def test_batches_are_the_same_for_every_number_of_processes(sizes: tuple[int, ...], tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    ids.mkdir()
    for number, size in enumerate(sizes, 1):
        phase(tmp_path / "elastic", ids, size, 5 * number)
    alone = replace(small_job(dropout=0.0))
    fit(alone, tmp_path / "alone", Loop(updates=20, batch=BATCH, micro=2, log_every=1))
    used: dict[int, list[int]] = defaultdict(list)
    for file in ids.iterdir():
        for update, found in json.loads(file.read_text()).items():
            used[int(update)] += found
    stream = Stream(0, LENGTH)
    for update in range(20):
        assert Counter(used[update]) == Counter(i for _, i in stream.keys(update * BATCH, BATCH)), update
    in_order = [key for update in range(20) for key in stream.keys(update * BATCH, BATCH)]
    for epoch in range(20 * BATCH // LENGTH):
        assert sorted(i for e, i in in_order if e == epoch) == list(range(LENGTH))
    assert relative_l2(tmp_path / "alone", tmp_path / "elastic") < 1e-5
