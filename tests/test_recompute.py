"""A layer under gradient checkpointing computes the same, keeps its names, and holds no more than it was told."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.language._recompute import Kept, lean


class Layer(nn.Module):
    """A gated MLP with dropout, as a decoder layer has one."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(torch.relu(self.gate(x)) * self.up(x)))


def _gradients(layers: list[nn.Module], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(4, 8, requires_grad=True)
    out: Any = x
    for layer in layers:
        out = layer(out)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for layer in layers for p in layer.parameters())]
    for layer in layers:
        layer.zero_grad()
    assert all(g is not None for g in grads)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_bitwise_those_of_the_plain_layer(dropout: float) -> None:
    torch.manual_seed(1)
    plain = [Layer(dropout), Layer(dropout)]
    leaned = copy.deepcopy(plain)
    assert lean(leaned) == 2
    assert all(torch.equal(a, b) for a, b in zip(_gradients(list(plain)), _gradients(list(leaned))))


def test_names_state_and_copies_are_those_of_the_plain_layer() -> None:
    layer, twin = Layer(), Layer()
    twin.load_state_dict(layer.state_dict())
    lean([layer])
    assert list(layer.state_dict()) == list(twin.state_dict()) and isinstance(layer, Layer)
    again = copy.deepcopy(layer)
    assert torch.equal(again(torch.ones(1, 8)), twin(torch.ones(1, 8)))
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(layer)  # weights are saved by name, never by class


def _kept_elements(layer: nn.Module) -> int:
    """Elements held between forward and backward that are not the layer's own parameters."""
    own, held = {p.data_ptr() for p in layer.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        layer(torch.randn(64, 8, requires_grad=True))
    return sum(t.numel() for t in held if t.data_ptr() not in own)


def test_the_input_alone_is_kept() -> None:
    layer = Layer()
    before = _kept_elements(layer)
    lean([layer])
    assert _kept_elements(layer) <= 64 * 8 + 16 < before


@pytest.mark.parametrize("kept", ["attention", "queries", "narrow", "products"])
def test_keeping_products_needs_a_compiled_layer(kept: Kept) -> None:
    with pytest.raises(TensorkeepError, match="compiled"):
        lean([Layer()], kept)


@pytest.mark.slow
def test_a_compiled_layer_agrees_and_keeps_no_wide_product() -> None:
    torch.manual_seed(1)
    plain = Layer()
    layer = copy.deepcopy(plain)
    lean([layer], "narrow", compiled=True)
    for a, b in zip(_gradients([plain]), _gradients([layer])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert _kept_elements(layer) <= 64 * 8 * 2 + 16  # its input, and the product that is no wider


class Attention(nn.Module):
    """One head, and a product behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(1, 1, -1, 8)
        seen = torch.nn.functional.scaled_dot_product_attention(q, q * 2, q * 3)
        return x + torch.relu(self.o(seen.view(-1, 8)))


@pytest.mark.slow
def test_what_attention_took_and_gave_is_kept_and_what_comes_behind_is_made_again() -> None:
    torch.manual_seed(1)
    plain = Attention()
    layer = copy.deepcopy(plain)
    lean([layer], "queries", compiled=True)
    for a, b in zip(_gradients([plain]), _gradients([layer])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert _kept_elements(layer) <= 64 * (8 + 8 + 8 + 1) + 16  # input, query, output of attention and its log-sums
