"""Place points on the levels of the pyramid, and decide which annotated segment each learns, as ActionFormer does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_NEAR_TIE = 1e-3  # grid steps: segments no longer than the shortest one by more than this share a point's classes


@lru_cache(maxsize=64)
def make_points(
    lengths: tuple[int, ...],
    strides: tuple[int, ...],
    ranges: tuple[tuple[float, float], ...],
    offset: bool = False,
    device: torch.device | None = None,
) -> tuple[Tensor, ...]:
    """Place the points of each level.

    Args:
        lengths: number of points of each level.
        strides: grid steps between two points of each level.
        ranges: shortest and longest distance that points of each level regress, in grid steps.
        offset: whether every point lies half a stride later.
        device: where the points are wanted.

    Returns:
        For each level `[T_l, 4]`: time, shortest and longest distance, stride, in grid steps. The tensors are shared
        between calls: do not write to them.

    Example:
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
    """Decide what every point learns from the segments of one video.

    A point learns the shortest segment that fits it; of equal ones the first.

    Args:
        points: `[P, 4]`, all levels concatenated.
        segments: `[N, 2]`, start and end in grid steps; N may be 0.
        labels: `[N]`, class numbers.
        classes: number of classes K.
        radius: a point fits a segment only within `radius * stride` of its centre; None: anywhere inside.
        near_ties: whether a point learns only the classes of segments as long as the shortest one (to a thousandth of
            a grid step); else of all that fit.

    Returns:
        Classes `[P, K]` of 0 and 1, and distances `[P, 2]` to start and end in strides, which mean something only where
        a class is set.

    Example:
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
    # the first of equals: which index `min` gives for them is not defined
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
    """Apply `assign_targets` to each video of a batch; gives classes `[B, P, K]` and distances `[B, P, 2]`."""
    flat = torch.cat(list(points))
    pairs = [assign_targets(flat, s, y, classes, radius, near_ties) for s, y in zip(segments, labels)]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
