"""A run is killed at random instants and started again until it ends; it must be bitwise the run that nobody killed.

The kills are SIGKILLs, many of them inside a save. The long form, with a language model and other tools beside, is
`benchmarks/kill.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks.kill import Marks, System, campaign, drop_ours, mark_saves, newest_ours, result_ours

from tensorkeep.training.job import Loop
from tensorkeep.training.loop import fit
from tensorkeep.training.saver import Keep
from tests.training import small_job


def train(run: Path, marks: Marks, start: int) -> None:
    torch.set_num_threads(1)  # the parent's pool of threads did not come along
    mark_saves(marks)
    loop = Loop(
        updates=24,
        batch=5,
        micro=2,
        save_every=1,
        log_every=1,
        evaluate_every=3,
        best="-error",
        keep=Keep(last=2),
        background=start % 2 == 0,
    )
    job = small_job(evaluate=True)
    marks.set(0, 1)
    fit(job, run, loop)


def test_killed_at_random_instants_it_ends_bitwise_where_it_would_have(tmp_path: Path) -> None:
    fit(small_job(), tmp_path, Loop(updates=1, batch=5))  # what is imported late is imported before the forks
    system = System("small", train, result_ours, newest_ours, drop_ours)
    count = campaign(system, kills=12, seed=0, longest=0.25)
    assert count.kills >= 12
    assert (count.stuck, count.lost, count.different, count.rows_wrong) == (0, 0, 0, 0), count
