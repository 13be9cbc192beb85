from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensorkeep.detection.model._attention import attend, attend_backward, choose_kernel
from tensorkeep.detection.model._frozen import _Frozen, add_branch, add_norm, norm_backward
from tensorkeep.detection.model._time_mix import time_mix
from tensorkeep.detection.model.detector import video_features
from tests import gpu
from tests.detection import tiny

# the kernels are checked where there is a GPU, the plain form everywhere
GPU = [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
PLACES: list[Any] = [("cpu", torch.float64, 1e-9)]
if gpu.HERE:
    PLACES += [pytest.param("cuda", d, t, marks=pytest.mark.gpu) for d, t in GPU]
KEPT = torch.tensor([0.0, 2.0, 1.25]).view(3, 1, 1)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.detach().double().cpu() - wanted.detach()).norm() / wanted.detach().norm()).item()


def _norm(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-6, dtype=torch.float64)
    norm.weight.data, norm.bias.data = _random(width, seed=5), _random(width, seed=6)
    return norm


@pytest.mark.parametrize("width", [32, 88])
@pytest.mark.parametrize("kept", [None, KEPT])
@pytest.mark.parametrize("device,dtype,tolerance", PLACES)
def test_fused_row_operations(
    device: str, dtype: torch.dtype, tolerance: float, kept: torch.Tensor | None, width: int
) -> None:
    x, branch, grad = (_random(3, 5, width, seed=seed) for seed in range(3))
    norm = _norm(width)
    leaf = x.clone().requires_grad_()
    factor = 1.0 if kept is None else kept.double()
    (back,) = torch.autograd.grad(norm(leaf), leaf, grad * factor)
    total = x + branch * factor
    wanted = [total, norm(total), branch + back]
    moved = [t.to(device, dtype) for t in (x, branch, grad)]
    scale, norm = None if kept is None else kept.to(device, dtype), norm.to(device, dtype)
    with torch.no_grad():
        found = [*add_norm(moved[0], moved[1], scale, norm), torch.empty_like(moved[0])]
        norm_backward(moved[2], moved[0], norm, moved[1], scale, found[2])
        alone = torch.empty_like(moved[0])
        add_branch(moved[0], moved[1], scale, alone)
    assert max(_distance(f, w) for f, w in zip([*found, alone], [*wanted, total])) < tolerance


@pytest.mark.parametrize(
    "kernel", ["cpu", "any", *(pytest.param(k, marks=pytest.mark.gpu) for k in ("flash", "cudnn") if gpu.HERE)]
)
def test_attention_by_hand_equals_autograd(kernel: str) -> None:
    device, dtype = ("cpu", torch.float64) if kernel in ("cpu", "any") else ("cuda", torch.bfloat16)
    qkv, grad = _random(2, 9, 3, 4, 16), _random(2, 4, 9, 16, seed=1)
    leaves = [x.detach().clone().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    out = F.scaled_dot_product_attention(*leaves)
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    q, k, v = qkv.to(device, dtype).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        done = attend(q, k, v, kernel)
        found = [done.out, *attend_backward(grad.to(device, dtype), q, k, v, done)]
    assert max(_distance(f, w) for f, w in zip(found, wanted)) < (1e-9 if dtype == torch.float64 else 1e-2)


def test_a_cpu_has_its_own_kernel_and_integers_none() -> None:
    assert choose_kernel(torch.zeros(1, 1, 2, 8)) == "cpu"
    assert choose_kernel(torch.zeros(1, 1, 2, 8, dtype=torch.complex64)) == "any"


@pytest.mark.parametrize("taps", [1, 3, 7])
def test_time_mix_equals_shifted_sums_with_their_gradients(taps: int) -> None:
    z = _random(2, 3, 4, 5).requires_grad_()
    weight, bias = _random(taps, 5, 5, seed=1).requires_grad_(), _random(5, seed=2).requires_grad_()
    half = taps // 2
    padded = F.pad(z, (0, 0, 0, 0, half, half))
    wanted = z + bias + sum(padded[:, k : k + 3] @ weight[k].T for k in range(taps))
    found = time_mix(z, weight, bias)
    assert torch.allclose(found, wanted)
    grad = _random(2, 3, 4, 5, seed=3)
    for a, b in zip(*(torch.autograd.grad(y, (z, weight, bias), grad) for y in (found, wanted))):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_kept_attention_changes_no_bit(monkeypatch: pytest.MonkeyPatch, part: float) -> None:
    monkeypatch.setattr("tensorkeep.detection.model.vit.attention_kept", lambda width: part)
    grads = []
    for checkpointing in ("none", "segments"):
        torch.manual_seed(0)
        backbone = tiny.detector(checkpointing=checkpointing).backbone
        assert backbone is not None
        video_features(backbone.train(), tiny.batch()[0], 8).square().sum().backward()
        grads.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(grads[0]) == 18 and all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_trunk_that_trains_takes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = _Frozen.apply
    monkeypatch.setattr(_Frozen, "apply", lambda *args: calls.append(1) or apply(*args))
    for tuning, expected in (("adapter", 1), ("all", 0)):
        calls.clear()
        backbone = tiny.detector(checkpointing="segments", tuning=tuning).backbone
        assert backbone is not None
        video_features(backbone.train(), tiny.batch()[0], 8).sum().backward()
        assert len(calls) == expected  # block 0 has nothing below it that trains: forward only
