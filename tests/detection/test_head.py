from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tensorkeep.detection.model.assignment import assign_targets, make_points
from tensorkeep.detection.model.config import HeadConfig
from tensorkeep.detection.model.head import Head, Predictions, valid_proposals
from tensorkeep.detection.model.losses import diou_loss, giou_loss, smooth_targets
from tensorkeep.errors import TensorkeepError
from tests.detection import tiny


def _head(**changes: object) -> Head:
    torch.manual_seed(0)
    head = Head(replace(tiny.HEAD, **changes), 16)  # type: ignore[arg-type]
    tiny.wake(head)
    return head


def _predict(head: Head, batch: int = 2) -> Predictions:
    torch.manual_seed(1)
    features = [torch.randn(batch, 16, length) for length in (16, 8, 4)]
    masks = [torch.arange(length)[None] < torch.tensor([[length], [length * 3 // 4]]) for length in (16, 8, 4)]
    return head(features, masks)


SEGMENTS = [torch.tensor([[1.0, 6.0], [4.0, 15.0]]), torch.tensor([[2.0, 9.0]])]
LABELS = [torch.tensor([0, 2]), torch.tensor([1])]


def test_ties_between_segments_go_to_the_first_and_share_classes() -> None:
    points = make_points((8,), (1,), ((0, 99),))[0]
    segments = torch.tensor([[0.0, 6.0], [0.0, 6.0], [0.0, 6.0005]])
    classes, distances = assign_targets(points, segments, torch.tensor([2, 0, 1]), classes=3)
    assert classes[3].tolist() == [1, 1, 1]
    assert distances[3].tolist() == [3, 3]
    alone, _ = assign_targets(points, torch.tensor([[0.0, 6.0], [2.0, 5.0]]), torch.tensor([0, 1]), 2)
    assert alone[3].tolist() == [0, 1]  # the shorter one
    both, _ = assign_targets(points, torch.tensor([[0.0, 6.0], [2.0, 5.0]]), torch.tensor([0, 1]), 2, near_ties=False)
    assert both[3].tolist() == [1, 1]


def test_range_is_inclusive_and_inside_is_strict() -> None:
    points = make_points((10,), (1,), ((0, 4),))[0]
    classes, _ = assign_targets(points, torch.tensor([[0.0, 8.0]]), torch.tensor([0]), 1, radius=None)
    assert classes[:, 0].nonzero().flatten().tolist() == [4]
    edge, _ = assign_targets(points, torch.tensor([[2.0, 4.0]]), torch.tensor([0]), 1, radius=None)
    assert edge[:, 0].nonzero().flatten().tolist() == [3]


def test_offset_points_lie_half_a_stride_later() -> None:
    assert make_points((2,), (4,), ((0, 1),), offset=True)[0][:, 0].tolist() == [2.0, 6.0]


def test_the_normaliser_moves_in_training_only_and_is_used_after_moving() -> None:
    head = _head(loss_normalizer=50)
    out = _predict(head)
    cls_sum, reg_sum, positives = head.loss_sums(out, SEGMENTS, LABELS)
    evaluated = head.eval().loss(out, SEGMENTS, LABELS)
    assert evaluated.cls_loss == cls_sum / positives and head.get_buffer("loss_normalizer").item() == 50
    trained = head.train().loss(out, SEGMENTS, LABELS)
    wanted = 0.9 * 50 + 0.1 * positives.item()
    assert head.get_buffer("loss_normalizer").item() == pytest.approx(wanted)
    assert trained.reg_loss.item() == pytest.approx(reg_sum.item() / wanted)
    assert head.get_buffer("loss_normalizer").dtype == torch.float32


def test_loss_is_the_plain_sum_over_selected_points() -> None:
    head = _head(label_smoothing=0.1, loss_weight=2.0).eval()
    out = _predict(head)
    losses = head.loss(out, SEGMENTS, LABELS)
    from tensorkeep.detection.model.assignment import assign_batch
    from tensorkeep.detection.model.head import refine_segments
    from tensorkeep.detection.model.losses import focal_loss

    classes, distances = assign_batch(out.points, SEGMENTS, LABELS, 3)
    valid = torch.cat(out.masks, 1)
    positive = (classes.sum(-1) > 0) & valid
    logits = torch.cat(out.logits, 2).transpose(1, 2)
    points = torch.cat(out.points)
    cls = focal_loss(logits[valid], smooth_targets(classes, 0.1)[valid]).sum() / positive.sum()
    predicted = refine_segments(points, torch.cat(out.offsets, 2).transpose(1, 2))[positive]
    reg = 2 * diou_loss(predicted, refine_segments(points, distances)[positive]).sum() / positive.sum()
    assert losses.cls_loss.item() == pytest.approx(cls.item(), rel=1e-6)
    assert losses.reg_loss.item() == pytest.approx(reg.item(), rel=1e-6)


def test_a_batch_without_ground_truth_has_a_loss_and_finite_gradients() -> None:
    head = _head()
    nothing = [torch.zeros(0, 2)] * 2
    losses = head.train().loss(_predict(head), nothing, [torch.zeros(0, dtype=torch.long)] * 2)
    assert losses.reg_loss == 0 and losses.positives == 0
    losses.cost.backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_weight_zero_balances_the_two_losses() -> None:
    losses = _head(loss_weight=0.0).eval().loss(_predict(_head()), SEGMENTS, LABELS)
    assert losses.reg_loss.item() == pytest.approx(losses.cls_loss.item(), rel=1e-5)


def test_proposals_hold_valid_points_only() -> None:
    out = _predict(_head())
    proposals = valid_proposals(out)
    assert [len(segments) for segments, _ in proposals] == [28, 21]
    assert all((segments[:, 1] >= segments[:, 0]).all() and (scores > 0).all() for segments, scores in proposals)


def test_overlap_losses_are_zero_for_equal_and_above_one_for_disjoint() -> None:
    a, b = torch.tensor([[0.0, 4.0]]), torch.tensor([[6.0, 8.0]])
    assert diou_loss(a, a).item() == 0 and giou_loss(a, a).item() == pytest.approx(0, abs=1e-5)
    assert diou_loss(a, b).item() > 1 and giou_loss(a, b).item() > 1


@pytest.mark.parametrize(
    ("found", "wanted", "gradient"),
    [([0.0, 1.0], [1.0, 2.0], [0.0, -0.75]), ([1.0, 1.0], [0.0, 2.0], [0.5, -0.5])],
    ids=["touching", "without length"],
)
def test_a_segment_whose_overlap_is_0_is_drawn_to_its_target(
    found: list[float], wanted: list[float], gradient: list[float]
) -> None:
    """The gradient of `clamp(min=0)` at 0 is 1 before torch 2.15, as the original learned by, and 0 since."""
    segment = torch.tensor([found], requires_grad=True)
    diou_loss(segment, torch.tensor([wanted])).sum().backward()
    assert segment.grad is not None and segment.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_levels_of_strides_and_ranges_must_agree() -> None:
    with pytest.raises(TensorkeepError, match="2 strides but 1 ranges"):
        HeadConfig(strides=(1, 2), ranges=((0, 4),))
