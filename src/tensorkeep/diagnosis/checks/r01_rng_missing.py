"""R01 RNG missing: a resumable checkpoint without the state of its random generators.

What it means
    Optimizer state and position are there; the random generators of Python, numpy, torch and the devices are not.

How it shows
    Dropout, drop path and random augmentation go on from another point, so the resumed run is another run. Where
    augmentation draws from a global generator, 56 to 69 % of the rows differ after a resume (MiniMind's data sets),
    and every row with worker processes in transformers' Trainer, accelerate and Lightning.

What to do
    Save the generators of each process and restore them last; or draw augmentation from (seed, epoch, sample index),
    which needs no state at all. A run without dropout and without random data loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import resume_state
from tensorkeep.findings import Finding

CODE = "R01"


def check(case: Case) -> Iterator[Finding]:
    """Warn of training state without the state of any random generator."""
    state = resume_state(case)
    if state is None:
        return
    evidence = {"layout": state.layout, "world_size": state.world, **state.position}
    if not state.rng:
        message = "no state of any random generator: dropout and random augmentation will differ after a resume"
        yield Finding(CODE, "warning", message, (), evidence)
