"""A gated MLP as one operation computes what the three linears compute one by one, whatever they are made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.adapters.lora import add_lora, merged
from tensorkeep.language import _gated_mlp
from tensorkeep.language._gated_layers import Fused, fuse_mlps
from tensorkeep.quantization.linear import QuantLinear
from tests.gpu import DEVICES, needs_gpu


class Mlp(nn.Module):
    """As Llama's."""

    def __init__(self, width: int = 64, inner: int = 160, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=False), act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """What has an `mlp`."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def _layer(codes: Any = None, targets: list[str] | None = None, act: nn.Module | None = None, width: int = 64) -> Layer:
    torch.manual_seed(1)
    mlp = Mlp(width, act=act)
    if codes:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, QuantLinear.of(getattr(mlp, name), codes))
    layer = Layer(mlp).requires_grad_(False)
    if targets:
        add_lora(layer, targets, r=3, alpha=7)
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return layer.train()


def _results(layer: nn.Module, tokens: int = 10, width: int = 64) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of what trains."""
    first = next(layer.parameters(), None)
    device = first.device if first is not None else next(layer.buffers()).device
    dtype = next((p.dtype for n, p in layer.named_parameters() if "lora" not in n), torch.float32)
    torch.manual_seed(2)
    x = torch.randn(2, tokens // 2, width).to(device, dtype).requires_grad_()
    out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **found}


ALL = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [ALL, ["up_proj"], ["gate_proj", "down_proj"], []])
@pytest.mark.parametrize("codes", [None, "nf4", "int8"])
@pytest.mark.parametrize("keeps", [True, False])
def test_output_and_gradients_are_those_of_the_three_linears(
    targets: list[str], codes: str | None, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gated_mlp, "CHUNK_BYTES", 2 * 160 * 4 * 3)  # three tokens at a time
    plain = _layer(codes, targets)
    fused = copy.deepcopy(plain)
    assert fuse_mlps([fused], [keeps]) == 1 and isinstance(fused.mlp, Mlp)
    expected, found = _results(plain), _results(fused)
    assert list(found) == list(expected) and list(fused.state_dict()) == list(plain.state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def _reference(layer: Layer, tokens: int, width: int) -> dict[str, Tensor]:
    """The same in float64, written out."""
    mlp: Any = layer.mlp
    torch.manual_seed(2)
    x = torch.randn(2, tokens // 2, width).to(torch.bfloat16).double().requires_grad_()
    made, leaves = {}, {"x": x}

    def linear(name: str, value: Tensor) -> Tensor:
        part = getattr(mlp, name)
        a, b = (t.detach().cpu().double().requires_grad_() for t in (part.lora_A, part.lora_B))
        leaves[f"mlp.{name}.lora_A"], leaves[f"mlp.{name}.lora_B"] = a, b
        weight = part.dequantize().cpu().double()
        return F.linear(value, weight) + part.scale * F.linear(F.linear(value, a), b)

    out = x + linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))
    made["out"] = out.detach()
    (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    return made | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keeps", [True, False])
def test_in_bfloat16_it_is_near_float64(device: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gated_mlp, "CHUNK_BYTES", 2 * 160 * 2 * 256)  # 256 tokens at a time
    layer = _layer("nf4", ALL).to(device)
    fuse_mlps([layer], [keeps])
    expected = _reference(layer, 600, 64)
    torch.manual_seed(2)
    x = torch.randn(2, 300, 64).to(device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view(out.shape)
    (out.double() * weights).sum().backward()
    found = {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    for name, value in expected.items():
        got = found[name]
        assert got is not None
        assert float((got.double().cpu() - value).norm() / value.norm()) < 2e-2, name


@needs_gpu
def test_the_kernels_are_those_of_torch() -> None:
    for act in ("silu", "gelu_tanh"):
        pair = torch.randn(300, 2 * 5000, device="cuda", dtype=torch.bfloat16)
        slope = torch.randn(300, 5000, device="cuda", dtype=torch.bfloat16)
        host, mine, theirs = slope.cpu(), torch.empty_like(pair), torch.empty_like(pair, device="cpu")
        _gated_mlp.gated_backward_into(pair, slope, mine, act)
        _gated_mlp.gated_backward_into(pair.cpu(), host, theirs, act)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(slope.cpu(), host, rtol=1e-2, atol=1e-2)
        hidden, other = torch.empty_like(slope), torch.empty_like(host)
        _gated_mlp.gated_into(pair, hidden, act)
        _gated_mlp.gated_into(pair.cpu(), other, act)
        torch.testing.assert_close(hidden.cpu(), other, rtol=1e-2, atol=1e-2)


def test_what_is_of_another_form_stays_as_it_is() -> None:
    class Squared(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    odd = [Layer(Squared()), Layer(Mlp(act=nn.Tanh())), Layer(nn.Linear(64, 64)), nn.Linear(4, 4)]
    assert fuse_mlps(odd, [True] * 4) == 0 and not any(isinstance(m, Fused) for layer in odd for m in layer.modules())


def test_an_mlp_that_trains_is_merged_or_drops_keeps_its_own_forward() -> None:
    plain = _layer(None, ALL)
    layer = copy.deepcopy(plain)
    fuse_mlps([layer], [False])
    with merged(plain), merged(layer), torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 64)), plain(torch.ones(1, 64)))
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 64)), plain(torch.ones(1, 64)))
    for one in (plain, layer):
        one.mlp.up_proj.weight.requires_grad_(True)  # type: ignore[union-attr]
    expected, found = _results(plain), _results(layer)
    assert "mlp.up_proj.weight" in found and all(torch.equal(found[n], expected[n]) for n in expected)
