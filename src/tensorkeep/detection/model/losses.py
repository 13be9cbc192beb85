"""Losses of the detection head, each computed element by element on aligned predictions and targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the sigmoid focal loss of every element: `alpha_t (1 - p_t)^gamma * BCE` (Lin et al. 2017, eq. 5).

    Args:
        logits: any shape.
        targets: of the same shape, 0 to 1; soft ones (label smoothing) give `p_t = p y + (1 - p)(1 - y)`.
        alpha: weight of the positive side.
        gamma: how much well-classified elements are weighed down.

    Returns:
        float32, of the same shape.

    Example:
        >>> focal_loss(torch.zeros(1), torch.ones(1))
        tensor([0.0433])
    """
    logits, targets = logits.float(), targets.float()
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * cross_entropy * (1 - p_t) ** gamma


def smooth_targets(targets: Tensor, smoothing: float) -> Tensor:
    """Smooth class targets `[..., K]`: `y (1 - e) + e / (K + 1)` with e = `smoothing`."""
    return targets * (1 - smoothing) + smoothing / (targets.shape[-1] + 1)


def not_negative(lengths: Tensor) -> Tensor:
    """Return lengths, 0 in place of negative ones; the gradient at 0 is 1, as the originals learn by.

    `clamp(min=0)` has that gradient before torch 2.15, and 0 since: segments that touch, or that have no length yet,
    would no longer be drawn together.
    """
    return torch.where(lengths < 0, 0.0, lengths)


def diou_loss(predicted: Tensor, target: Tensor, eps: float = 1e-7) -> Tensor:
    """Return `1 - DIoU` of aligned segments `[..., 2]`: `[...]`, in `[0, 2)`, without a unit.

    `DIoU = inter / max(union, eps) - d^2 / max(enclosing^2, eps)`, d the distance of the centres (Zheng et al. 2020).

    Example:
        >>> diou_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.])
    """
    inter, union, enclosing = _overlap(predicted, target)
    distance = (target.sum(-1) - predicted.sum(-1)) / 2
    return 1 - (inter / union.clamp(min=eps) - distance * distance / (enclosing * enclosing).clamp(min=eps))


def giou_loss(predicted: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Return `1 - GIoU` of aligned segments `[..., 2]`: `[...]`, in `[0, 2)` (Rezatofighi et al. 2019)."""
    inter, union, enclosing = _overlap(predicted, target)
    enclosing = enclosing.clamp(min=1e-7)  # with OpenTAD's own guards, so that degenerate segments agree too
    return 1 - (inter / union.clamp(min=eps) - (enclosing - union) / (enclosing + eps))


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lengths of intersection, union and enclosing segment, each `[...]`."""
    inter = not_negative(torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0]))
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - inter
    enclosing = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return inter, union, enclosing
