"""The training loop, a run's state on disk, and recipes as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep._face import lazy

if TYPE_CHECKING:
    from tensorkeep.training.distributed import World as World
    from tensorkeep.training.ema import Ema as Ema
    from tensorkeep.training.job import Job as Job
    from tensorkeep.training.job import Loop as Loop
    from tensorkeep.training.loop import Outcome as Outcome
    from tensorkeep.training.loop import fit as fit
    from tensorkeep.training.saver import Keep as Keep
    from tensorkeep.training.saver import State as State

_WHERE = {
    "Ema": "ema",
    "Job": "job",
    "Keep": "saver",
    "Loop": "job",
    "Outcome": "loop",
    "State": "saver",
    "World": "distributed",
    "fit": "loop",
}
__all__ = ["Ema", "Job", "Keep", "Loop", "Outcome", "State", "World", "fit"]
__getattr__, __dir__ = lazy(__name__, _WHERE)
