"""The chunked loss through the head equals cross-entropy on whole logits, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.language._head_loss import head_loss
from tensorkeep.language.data.batches import IGNORED
from tests.gpu import needs_gpu


def _case(
    tokens: int, seed: int = 0, vocab: int = 37, width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[::3] = IGNORED
    return hidden, weight, labels


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 99), head_trains=st.booleans())
def test_loss_and_gradients_are_those_of_cross_entropy_for_every_chunk(
    tokens: int, chunk: int, seed: int, head_trains: bool
) -> None:
    hidden, weight, labels = _case(tokens, seed)
    mine, theirs = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_(head_trains)] for _ in range(2))
    loss = head_loss(*mine, labels, divisor=7.0, chunk=chunk)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, labels, ignore_index=IGNORED, reduction="sum") / 7.0
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)  # sums are float32
    torch.testing.assert_close(mine[0].grad, theirs[0].grad, rtol=1e-5, atol=1e-6)
    if head_trains:
        torch.testing.assert_close(mine[1].grad, theirs[1].grad, rtol=1e-5, atol=1e-6)


def test_what_does_not_count_gets_no_gradient_at_all() -> None:
    hidden, weight, labels = _case(9)
    hidden.requires_grad_()
    head_loss(hidden, weight, labels, 1.0, chunk=4).backward()
    assert hidden.grad is not None and not hidden.grad[labels == IGNORED].any()


def test_batches_of_sequences_are_flattened_and_bf16_stays_near() -> None:
    hidden, weight, labels = _case(12)
    whole = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum") / 12
    shaped = head_loss(hidden.view(3, 4, -1).bfloat16(), weight.bfloat16(), labels.view(3, 4), 12.0)
    assert shaped.dtype == torch.float32 and shaped.item() == pytest.approx(whole.item(), rel=2e-2)


def test_without_gradients_only_the_number_is_made() -> None:
    hidden, weight, labels = _case(5)
    with torch.no_grad():
        loss = head_loss(hidden, weight, labels, 2.0)
    assert not loss.requires_grad and torch.isfinite(loss)


@needs_gpu
@pytest.mark.parametrize(("tokens", "vocab"), [(5, 100), (70, 128_256), (3, 4096), (0, 50)])
def test_the_kernel_is_near_float64(tokens: int, vocab: int) -> None:
    from tensorkeep.language._head_kernels import cross_entropy_

    logits = (torch.randn(tokens, vocab, device="cuda") * 3).bfloat16()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[:1] = IGNORED
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(cross_entropy_(logits, labels, IGNORED, True).double(), expected, rtol=1e-5, atol=1e-4)
    assert float((logits.double() - exact.grad).norm()) <= 4e-3 * float(exact.grad.norm())  # bfloat16's rounding
