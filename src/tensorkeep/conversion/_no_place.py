"""The error for tensors that a naming has no name for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import drops


def no_place(
    rest: Sequence[str], naming: str, names: Iterable[str], where: object = None, more: str = ""
) -> TensorkeepError:
    """Return the error for tensors that have no place in a naming (K07).

    Args:
        rest: their names.
        naming: what has no place for them, in words.
        names: all names there, so that a pattern for the hint fits the rest alone.
        where: the checkpoint.
        more: what else could be done.
    """
    nor = f", nor have {len(rest) - 1} more" if len(rest) > 1 else ""
    hint = f"leave it out by name: {drops(rest, names)}" + (f", or {more}" if more else "")
    return TensorkeepError(f"{rest[0]} has no place in {naming}{nor}", where=where, code="K07", tensors=rest, hint=hint)
