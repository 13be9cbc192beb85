"""Refuse a naming that moves rows of quantized weights where codes and scales do not move together.

Some namings have other rows of q and k, or one matrix for q, k and v. Rows of codes may go with them where each row has
its own codes and scales (int8, fp8 by row). Codes that lie flat, or by input (bitsandbytes' four bits, GPTQ, AWQ), and
scales of blocks would then belong to other weights, and no shape would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorkeep.conversion.plan import Part
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.quantization.stored import QuantizedWeight, find_quantized, members


def refuse_moved_codes(made: Iterable[Sequence[Part]], sources: Sequence[StateView]) -> None:
    """Stop where rows of codes or scales are to be moved, split or joined, and would mean something else there.

    Args:
        made: for each tensor that is made, the stored rows that it is made of.
        sources: the checkpoints that hold them.

    Raises:
        TensorkeepError: Q01, with the first such weight.
    """
    moved = [p for parts in made for p in parts if len(parts) > 1 or not p.plain or p.rows or p.inner]
    for index, view in enumerate(sources if moved else ()):
        weights = find_quantized(view)
        owner = {**{n: n for n in weights}, **members(weights)}
        for part in (p for p in moved if p.source == index and p.name in owner):
            weight = weights[owner[part.name]]
            if not _together(view, weight, part):
                raise TensorkeepError(
                    f"{part.name} is part of a quantized weight ({weight.kind}), whose rows are not those of its codes "
                    "and scales: to move them as this naming does would give them other values",
                    where=view.path,
                    code="Q01",
                    hint="keep the hf names (--naming hf), or make floats of it: --dtype bf16",
                )


def _together(view: StateView, weight: QuantizedWeight, part: Part) -> bool:
    """Say whether the rows that a part moves have codes and scales of their own."""
    alone = view[part.name].elements == 1  # one scale for all rows has no place among those of others
    if part.turned or part.plus or alone or weight.name not in view or weight.shape is None:
        return False
    codes = view[weight.name].shape
    depth = 2 if part.inner is not None or (weight.stacked and part.permutes) else 1
    scales = [view[n] for n in weight.parts.values() if n in view]
    return codes[:1] == weight.shape[:1] and all(r.elements == 1 or r.shape[:depth] == codes[:depth] for r in scales)
