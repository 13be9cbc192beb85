"""Points on the pyramid and which ground truth each of them learns (ActionFormer's assignment)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_NEAR_TIE = 1e-3  # grid units: segments this close to the shortest one share a point's classes


@lru_cache(maxsize=64)
def make_points(
    lengths: tuple[int, ...],
    strides: tuple[int, ...],
    ranges: tuple[tuple[float, float], ...],
    offset: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, ...]:
    """Points of each level, `[T_l, 4]` = (time, shortest, longest distance to regress, stride), in grid units.

    `offset` moves every point by half a stride. The result is shared between calls: do not write to it.

    >>> make_points((2,), (4,), ((0, 8),))[0]
    tensor([[0., 0., 8., 4.],
            [4., 0., 8., 4.]])
    """
    levels = []
    for length, stride, (low, high) in zip(lengths, strides, ranges):
        rows = torch.empty(length, 4, device="cpu")
        rows[:, 0] = torch.arange(length) * stride + (0.5 * stride if offset else 0.0)
        rows[:, 1], rows[:, 2], rows[:, 3] = low, high, stride
        levels.append(rows.to(device))
    return tuple(levels)


@torch.no_grad()
def assign_targets(
    points: Tensor, segments: Tensor, labels: Tensor, classes: int, radius: float | None = 1.5, near_ties: bool = True
) -> tuple[Tensor, Tensor]:
    """Targets of every point for one video.

    Args:
        points: `[P, 4]`, all levels concatenated.
        segments: `[N, 2]` start and end on the feature grid; `labels [N]` integer classes. N may be 0.
        radius: centre sampling: a point counts as inside within `radius * stride` of the centre; None: anywhere inside.
        near_ties: classes are the union over segments within `_NEAR_TIE` of the shortest (False: over all that fit).

    Returns:
        classes `[P, K]` of 0 and 1, and distances `[P, 2]` to start and end in strides, of the shortest segment that
        fits (meaningful only where a class is set). Ties go to the segment listed first.

    >>> points = make_points((4,), (1,), ((0, 8),))[0]
    >>> assign_targets(points, torch.tensor([[0.0, 2.0]]), torch.tensor([1]), classes=2)[0].argmax(1)
    tensor([0, 1, 0, 0])
    """
    if len(segments) == 0:
        return points.new_zeros(len(points), classes), points.new_zeros(len(points), 2)
    time, low, high, stride = (column[:, None] for column in points.unbind(1))  # each [P, 1]
    start, end = segments.to(points.dtype).unbind(1)  # each [N]
    left, right = time - start, end - time  # [P, N]
    if radius is None:
        inside = torch.minimum(left, right) > 0
    else:
        centre = 0.5 * (start + end)
        to_left = time - torch.maximum(centre - stride * radius, start)
        to_right = torch.minimum(centre + stride * radius, end) - time
        inside = torch.minimum(to_left, to_right) > 0
    reach = torch.maximum(left, right)
    fits = inside & (reach >= low) & (reach <= high)
    lengths = torch.where(fits, (end - start).expand_as(fits), torch.inf)  # [P, N]
    shortest = lengths.min(1, keepdim=True).values
    # the first of equals: min's own index is not defined on ties
    order = torch.arange(lengths.shape[1], device=points.device)
    chosen = torch.where(lengths == shortest, order, lengths.shape[1]).min(1).values  # [P]
    share = fits & (lengths <= shortest + _NEAR_TIE) if near_ties else fits
    one_hot = F.one_hot(labels.long(), classes).to(points.dtype)  # [N, K]
    class_targets = (share.to(points.dtype) @ one_hot).clamp_(max=1.0)  # [P, K]
    distances = torch.stack([left, right], -1).gather(1, chosen[:, None, None].expand(-1, 1, 2)).squeeze(1)
    return class_targets, distances / stride


def assign_batch(
    points: Sequence[Tensor],
    segments: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    radius: float | None = 1.5,
    near_ties: bool = True,
) -> tuple[Tensor, Tensor]:
    """`assign_targets` for each video of a batch, levels concatenated fine to coarse: `[B, P, K]`, `[B, P, 2]`."""
    flat = torch.cat(list(points))
    pairs = [assign_targets(flat, s, y, classes, radius, near_ties) for s, y in zip(segments, labels)]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
