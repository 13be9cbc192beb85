"""Carry what the header of safetensors files says beside the tensors: torchao keeps there what its codes mean."""

from __future__ import annotations

from tensorkeep.conversion.plan import Plan
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import Note


def carry(plan: Plan, to: str) -> None:
    """Put the sources' header entries into the plan, or note that the output has no place for them.

    Nobody here knows what an entry means, so every one goes along as it is; `format` alone is ours to write.

    Args:
        plan: gains `header` or a note (K07).
        to: the output's format.
    """
    entries = {
        key: value
        for view in plan.sources
        if view.format == "hf"
        for key, value in view.metadata.items()
        if isinstance(value, str) and key not in ("format", "taken")  # which part of a folder was read is ours
    }
    if not entries:
        return
    what = f"{len(entries)} entries of the safetensors header ({', '.join(grouped(entries)[:3])})"
    if to != "hf":
        plan.notes.append(Note("K07", f"{what} have no place in {to} and are left out", tuple(entries)))
        return
    plan.header = entries
    changed = [s for s in plan.steps if s.sink is not None and s.actions != ("keep",)]
    if changed:
        plan.notes.append(
            Note("K07", f"{what} go along as they are, although {len(changed)} tensors were changed", tuple(entries))
        )
