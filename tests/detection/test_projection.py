from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tensorkeep.detection.model.config import ProjectionConfig
from tensorkeep.detection.model.layers import halve_mask
from tensorkeep.detection.model.projection import Projection, banded_attention, global_attention, halve_max
from tensorkeep.errors import TensorkeepError
from tests.detection import tiny


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 100])
@pytest.mark.parametrize("window", [2, 3, 19, 99])
def test_banded_attention_equals_the_dense_form_at_any_length(length: int, window: int) -> None:
    torch.manual_seed(length + window)
    q, k, v = torch.randn(3, 2, 2, length, 4)
    mask = torch.rand(2, length) > 0.3
    scores = q @ k.transpose(2, 3) / 2
    position = torch.arange(length)
    far = (position[:, None] - position).abs() > window // 2
    scores = scores.masked_fill(far, -torch.inf) - 1e4 * ~mask[:, None, None]
    wanted = scores.softmax(-1) @ v
    ours = banded_attention(q, k, v, mask, window)
    assert torch.isfinite(ours).all()
    rows = mask[:, None, :, None]  # rows of invalid queries are masked by the caller
    assert torch.allclose(ours * rows, wanted * rows, atol=1e-5)


def test_banded_attention_with_no_valid_key_has_finite_gradients() -> None:
    q, k, v = (torch.randn(1, 1, 40, 4, requires_grad=True) for _ in range(3))
    out = banded_attention(q, k, v, torch.zeros(1, 40, dtype=torch.bool), 5)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v) if x.grad is not None)


def test_a_window_over_everything_is_global_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 4)
    mask = torch.arange(20)[None] < 15
    rows = mask[:, None, :, None]
    local, dense = banded_attention(q, k, v, mask, 41), global_attention(q, k, v, mask)
    assert torch.allclose(local * rows, dense * rows, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_halving_equals_max_pooling_and_nearest_masks(length: int) -> None:
    x = torch.randn(2, 3, length).round(decimals=1).requires_grad_()  # ties on purpose
    ours, theirs = halve_max(x), F.max_pool1d(x, 3, 2, 1)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    (mine,), (wanted,) = (torch.autograd.grad((y * weight).sum(), x) for y in (ours, theirs))
    assert torch.allclose(mine, wanted)
    mask = torch.rand(2, length) > 0.5
    nearest = F.interpolate(mask[:, None].float(), ours.shape[-1], mode="nearest")[:, 0].bool()
    assert torch.equal(halve_mask(mask), nearest)


def test_features_behind_the_mask_do_not_matter() -> None:
    config = tiny.projection(windows=(3,), max_length=16)
    model = Projection(config).eval()
    tiny.wake(model)
    x = torch.randn(1, 32, 16)
    other = x.clone()
    # one step beyond the mask is read by the embedding convolution, as in the original
    other[..., 11:] = 7.0
    mask = torch.arange(16)[None] < 10
    features, masks = zip(*((f, m) for f, m in zip(*model(x, mask))))
    again, _ = model(other, mask)
    for a, b, m in zip(features, again, masks):
        assert torch.allclose(a * m[:, None], b * m[:, None], atol=1e-6)


def test_positions_are_interpolated_beyond_their_table() -> None:
    from tensorkeep.detection.model._positions import sinusoid_table
    from tensorkeep.detection.model.projection import _positions

    table = sinusoid_table(8, 4).transpose(1, 2) / 2
    assert torch.equal(_positions(8, 4, 6, torch.device("cpu")), table[..., :6])
    wanted = F.interpolate(table, 12, mode="linear", align_corners=False)
    assert torch.allclose(_positions(8, 4, 12, torch.device("cpu")), wanted, atol=1e-6)


def test_drop_path_without_layer_scale_has_no_parameter() -> None:
    names = [name for name, _ in Projection(tiny.projection(layer_scale=False)).named_parameters()]
    assert not any("drop_path" in name for name in names)


def test_windows_must_fit_the_levels() -> None:
    with pytest.raises(TensorkeepError, match="3 levels"):
        tiny.projection(windows=(3, 3))
    assert ProjectionConfig(branch_layers=1, windows=(5, -1)).level_windows == (5, -1)
