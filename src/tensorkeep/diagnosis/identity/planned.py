"""The checkpoint that a plan would write, as a view: its identity is taken without writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tensorkeep.conversion.plan import Plan, Step
from tensorkeep.conversion.streams import write_tensor
from tensorkeep.formats.view import STREAM_BYTES, StateView
from tensorkeep.storage.record import TensorRecord, nbytes


@dataclass(eq=False)
class PlannedView(StateView):
    """What a plan writes; a tensor is made in memory when it is asked for.

    Attributes:
        plan: the plan.
        steps: its steps by the name that they write.
    """

    plan: Plan = field(default_factory=lambda: Plan([], [], None, None))
    steps: dict[str, Step] = field(default_factory=dict)

    def stream(
        self, name: str, rows: tuple[int, int] | None = None, granule: int = 1, chunk: int = STREAM_BYTES
    ) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces, as `StateView.stream` does; the whole tensor is made for it."""
        whole = bytearray()
        write_tensor(self.steps[name], self.plan.sources, whole.extend, crc_wanted=False)
        record = self.records[name]
        row = nbytes(record.dtype, record.shape[1:]) if record.shape else record.nbytes
        first, last = rows or (0, record.shape[0] if record.shape else 1)
        wanted = memoryview(whole)[first * row : last * row]
        step = max(chunk // granule, 1) * granule
        yield from (wanted[at : at + step] for at in range(0, len(wanted), step))


def planned(plan: Plan) -> StateView:
    """Return what a plan to write hf would write, as a view that computes it.

    Args:
        plan: made for the format hf, with plain tensors.
    """
    first = plan.sources[0]
    steps = {s.sink.name: s for s in plan.steps if s.sink is not None}
    records = {t.name: TensorRecord(t.name, t.dtype, t.shape, ()) for t in plan.tensors}
    made = PlannedView(first.path, "hf", first.folder, records, plan.config, list(plan.companions), computed=True)
    made.plan, made.steps = plan, steps
    return made
