"""R03 world size changed: the checkpoint was written by another number of processes.

What it is
    Per-rank state (data position, random generators, shards without metadata) belongs to a number of ranks.

How it shows
    torchtitan's loader refuses another data-parallel degree; MiniMind scales its step and, between one process and
    several, takes another permutation: 25 % of the rows twice and 25 % never when resumed halfway. accelerate ignores
    missing per-rank files without a word.

How it is proven
    Against a reference that names its world size. Without one it is only said which number the checkpoint asks for.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import reference_state, resume_state
from tensorkeep.findings import Finding

CODE = "R03"


def check(case: Case) -> Iterator[Finding]:
    """A warning where two world sizes are known and differ, an info for one above 1."""
    state, other = resume_state(case), reference_state(case)
    if state is None or state.world is None:
        return
    if other is not None and other.world is not None and other.world != state.world:
        yield Finding(
            CODE,
            "warning",
            f"written by {state.world} processes, the reference by {other.world}: data order and random state do not carry over",
            (),
            {"world_size": state.world, "reference": other.world},
        )
    elif state.world > 1 and other is None:
        yield Finding(
            CODE,
            "info",
            f"written by {state.world} processes: per-rank state resumes exactly on as many",
            (),
            {"world_size": state.world},
        )
