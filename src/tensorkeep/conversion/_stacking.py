"""Stack the experts of a layer, for namings that keep them in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorkeep.conversion.naming.rope import section
from tensorkeep.conversion.plan import HfTensor, Part
from tensorkeep.errors import TensorkeepError

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def stacked(name: str, members: dict[int, HfTensor], config: Mapping[str, Any] | None) -> HfTensor:
    """Stack the experts of one layer as the slices of one tensor.

    Args:
        name: the tensor's name in the output.
        members: the experts by their number.
        config: says how many there are.

    Returns:
        The stacked tensor, expert first.

    Raises:
        TensorkeepError: K01 where an expert is missing, S01 where they differ.
    """
    count = len(members)
    told = section(config)
    wanted = next((told[k] for k in _COUNTS if isinstance(told.get(k), int) and told[k]), count)
    first = members[min(members)]
    if sorted(members) != list(range(count)) or count != wanted:
        raise TensorkeepError(
            f"{name}: experts {sorted(members)} of {wanted}", code="K01", hint="the source is incomplete"
        )
    if any(m.shape != first.shape or m.dtype != first.dtype for m in members.values()):
        raise TensorkeepError(f"{name}: its experts differ in shape or dtype", code="S01")
    parts = tuple(part for e in range(count) for part in members[e].parts)
    whole = _contiguous(parts, count)
    return HfTensor(name, first.dtype, (count, *first.shape), whole, ("fuse",) if len(whole) > 1 else ())


def _contiguous(parts: tuple[Part, ...], count: int) -> tuple[Part, ...]:
    """Return one whole part where the slices are all those of one stacked tensor, in order."""
    if len({(p.source, p.name) for p in parts}) == 1 and [p.rows for p in parts] == [(e, e + 1) for e in range(count)]:
        return (parts[0]._replace(rows=None),)
    return parts
