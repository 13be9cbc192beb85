"""R03 world size changed: the checkpoint was written by another number of processes.

What it means
    Part of the state belongs to single processes (data position, random generators, shards without metadata), and so
    to a number of processes.

How it shows
    torchtitan's loader refuses another data-parallel degree. MiniMind scales its step, and with one process instead
    of several it shuffles otherwise: 25 % of the rows are seen twice and 25 % never when it is resumed halfway.
    accelerate ignores missing files of single processes without a word.

How it is found
    By comparison with a reference that says its number of processes. Without one the finding only says how many the
    checkpoint asks for.

What to do
    Resume on as many processes as it was written by, or accept that data order and random numbers are others.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import reference_state, resume_state
from tensorkeep.findings import Finding

CODE = "R03"


def check(case: Case) -> Iterator[Finding]:
    """Warn where checkpoint and reference were written by different numbers of processes; an info above 1."""
    state, other = resume_state(case), reference_state(case)
    if state is None or state.world is None:
        return
    if other is not None and other.world is not None and other.world != state.world:
        message = (
            f"written by {state.world} processes, the reference by {other.world}: data order and random state do not "
            "carry over"
        )
        yield Finding(CODE, "warning", message, (), {"world_size": state.world, "reference": other.world})
    elif state.world > 1 and other is None:
        message = f"written by {state.world} processes: per-rank state resumes exactly on as many"
        yield Finding(CODE, "info", message, (), {"world_size": state.world})
