"""R02 data position missing or in batches: where the data stood cannot be found again under other settings.

What it means
    A position is exact when it counts the samples that all processes together have consumed. A number of batches
    means something else once batch size, accumulation or the number of processes change; an epoch is a position only
    at its end.

How it shows
    On a data set of 10,000 rows, resumed halfway: with the batch size doubled 16 % of the rows are never trained on;
    with one process instead of several 25 % are seen twice and 25 % never.

What to do
    Resume with the same batch size, accumulation and number of processes; or compute the samples by hand: step x
    batch size x processes. Checkpoints of tensorkeep count samples.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.resume_state import resume_state
from tensorkeep.findings import Finding

CODE = "R02"
EXACT = ("samples", "consumed_samples")


def check(case: Case) -> Iterator[Finding]:
    """Warn of a missing position and of one in batches; an info where it holds under conditions."""
    state = resume_state(case)
    if state is None:
        return
    position = {k: v for k, v in state.position.items()}
    evidence = {"layout": state.layout, "world_size": state.world, **position}
    if any(position.get(k) is not None for k in EXACT):
        return
    if state.loader:
        message = (
            f"the data position is kept per rank ({len(state.loader)} entries): it resumes on the same number of "
            "data-parallel ranks only"
        )
        yield Finding(CODE, "info", message, (), evidence)
    elif not position:
        yield Finding(
            CODE, "warning", "nothing says where the data stood: a resume begins the epoch again", (), evidence
        )
    elif set(position) == {"epoch"}:
        yield Finding(CODE, "info", "the position is an epoch: right at an epoch's end, and nowhere else", (), evidence)
    else:
        message = (
            "the position counts batches or optimizer steps, not samples: it holds for the same batch size and "
            "number of processes only"
        )
        yield Finding(CODE, "warning", message, (), evidence)
