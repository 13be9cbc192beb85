"""R01 RNG missing: a resumable checkpoint without the state of its random generators.

What it is
    Optimizer and position are there; the generators of Python, numpy, torch and each device are not.

How it shows
    Dropout, drop path and random augmentation go on from another point: the resumed run is another run. Measured
    where augmentation draws from a global generator: 56 to 69 % of the rows differ after a resume (MiniMind's data
    sets), every row in transformers' Trainer, accelerate and Lightning with worker processes.

What to do
    Save generators per rank and restore them last; or draw augmentation from (seed, epoch, sample index), which needs
    no state at all. A run without dropout and without random data loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import resume_state
from tensorkeep.findings import Finding

CODE = "R01"


def check(case: Case) -> Iterator[Finding]:
    """A warning for training state without random state; for several ranks with the state of one."""
    state = resume_state(case)
    if state is None:
        return
    evidence = {"layout": state.layout, "world_size": state.world, **state.position}
    if not state.rng:
        yield Finding(
            CODE,
            "warning",
            "no state of any random generator: dropout and random augmentation will differ after a resume",
            (),
            evidence,
        )
