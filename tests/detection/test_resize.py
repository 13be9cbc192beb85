from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tensorkeep.detection.model.resize import linear_resize


@pytest.mark.parametrize(("source", "target"), [(384, 768), (384, 192), (7, 20), (20, 7), (1, 5), (5, 1), (6, 6)])
def test_resize_and_its_gradient_equal_interpolate(source: int, target: int) -> None:
    x = torch.randn(2, 3, source, requires_grad=True)
    weight = torch.randn(2, 3, target)
    ours = linear_resize(x, target)
    theirs = F.interpolate(x, target, mode="linear", align_corners=False)
    assert torch.allclose(ours, theirs, atol=1e-5)
    (mine,) = torch.autograd.grad((ours * weight).sum(), x)
    (wanted,) = torch.autograd.grad((theirs * weight).sum(), x)
    assert torch.allclose(mine, wanted, atol=1e-5)


def test_gradient_is_the_transpose() -> None:
    x = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: linear_resize(y, 8), x, atol=1e-6)
