"""A planned output as a view, before anything is written: its names, dtypes and shapes, and its bytes on demand.

Checks that read no more than headers and small states see the output as its reader will.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.storage.record import TensorRecord


@dataclass(eq=False)
class PlannedView(StateView):
    """The tensors that a plan will write; each is made of the plan's sources when its bytes are asked for."""

    plan: Plan | None = None
    steps: dict[str, Step] = field(default_factory=dict)

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes, made whole in memory; arguments as of `StateView.stream`."""
        assert self.plan is not None
        made = bytearray()
        write_tensor(self.steps[name], self.plan.sources, made.extend, crc_wanted=False)
        record = self.records[name]
        row = len(made) // record.shape[0] if record.shape and record.shape[0] else len(made)
        whole = memoryview(made)[rows[0] * row : rows[1] * row] if rows else memoryview(made)
        step = max(chunk // granule, 1) * granule
        yield from (whole[at : at + step] for at in range(0, len(whole), step))


def planned(plan: Plan, to: str) -> PlannedView:
    """Return the view of what a plan will write.

    Args:
        plan: from `make_plan` or `plan_merge`.
        to: the output's format.

    Returns:
        The view; it names the first source as its path, for messages.
    """
    first = plan.sources[0]
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    records = {
        n: TensorRecord(n, s.sink.dtype, s.sink.shape, (), tied_to=s.sink.tied_to)
        for n, s in steps.items()
        if s.sink is not None
    }
    return PlannedView(first.path, to, first.folder, records, plan.config, computed=True, plan=plan, steps=steps)
