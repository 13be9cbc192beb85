"""Tell whether the blocks of a sharded tensor overlap."""

from __future__ import annotations

import math

from tensorkeep.storage.record import Block


def overlapping(blocks: list[Block]) -> bool:
    """Tell whether two blocks share an element; with the right total, no overlap means an exact cover.

    Shards come from cutting the tensor through, again and again: that is followed, a dimension at a time. What
    cannot be cut is compared pair by pair, and taken for an overlap where that would be too much work.
    """
    pending = [([b for b in blocks if math.prod(b.shape)], 0, 0)]  # blocks, dimension to cut, dimensions without a cut
    work = 1_000_000 + 64 * len(blocks)
    while pending:
        group, dimension, uncut = pending.pop()
        if len(group) < 2:
            continue
        dimensions = len(group[0].shape)
        work -= len(group) ** 2 if uncut == dimensions else len(group)
        if work < 0:
            return True
        if uncut == dimensions:
            if _share(group):
                return True
            continue
        parts = _cut_through(group, dimension)
        pending += [(part, (dimension + 1) % dimensions, uncut + 1 if len(parts) == 1 else 1) for part in parts]
    return False


def _cut_through(group: list[Block], dimension: int) -> list[list[Block]]:
    """Sort the blocks into groups that no hyperplane across `dimension` meets twice."""
    parts: list[list[Block]] = []
    end = -1
    for block in sorted(group, key=lambda b: b.offsets[dimension]):
        if block.offsets[dimension] >= end:
            parts.append([])
        parts[-1].append(block)
        end = max(end, block.offsets[dimension] + block.shape[dimension])
    return parts


def _share(group: list[Block]) -> bool:
    """Tell whether any two blocks share an element, by comparing every pair."""
    return any(
        all(o < p + m and p < o + n for o, n, p, m in zip(a.offsets, a.shape, b.offsets, b.shape))
        for i, a in enumerate(group)
        for b in group[i + 1 :]
    )
