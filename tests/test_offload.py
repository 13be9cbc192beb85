"""What a backward pass needs waits in main memory and comes back as it was; on a CPU nothing moves."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorkeep.training.offload import HostStore, Offload, _dense
from tests.gpu import DEVICES, needs_gpu

MIB = 1 << 20


class Block(nn.Module):
    """Saves a tensor of its input's size, a transposed one and one four times as wide."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1).contiguous().transpose(0, 1).sin()
        return x + self.down(torch.relu(self.up(turned)))


def _run(
    blocks: Any, offload: Offload | None, device: str, largest: int | None = None, rows: int = 8192
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, 64, device=device, requires_grad=True)
    out: Tensor = x
    for block in blocks:
        if offload is None:
            out = block(out)
        else:
            with offload.saving({p.data_ptr() for p in block.parameters()}, largest):
                out = block(out)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for block in blocks for p in block.parameters())]
    for block in blocks:
        block.zero_grad()
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_are_bitwise_the_same_step_after_step(device: str) -> None:
    blocks = nn.ModuleList(Block() for _ in range(4)).to(device)
    expected, offload = _run(blocks, None, device), Offload()
    for largest in (None, None, 3 * MIB):
        found = _run(blocks, offload, device, largest)
        assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
    gc.collect()
    assert bool(offload.store.free) is (device == "cuda")  # buffers wait for the next step


class Noisy(Block):
    """Saves its input, drops some of it, and returns a pair, as some decoders do; counts its forwards."""

    forwards = 0

    def forward(self, x: Tensor) -> Any:
        self.forwards += 1
        return super().forward(x * nn.functional.dropout(torch.ones_like(x, requires_grad=True), 0.3)), None


def _placed(blocks: Any, offload: Offload, device: str, apart: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8192, 64, device=device, requires_grad=True)
    out: Tensor = x
    with torch.autocast(device, torch.bfloat16):
        for index, block in enumerate(blocks):
            taken = out * 2 if index == apart else out * 1 if index == 0 else out
            place = offload.place(taken)
            with offload.saving({p.data_ptr() for p in block.parameters()}, None, place):
                given = block(taken)
            if place is not None:
                place.stretch.add(block, given)
            out = given[0]
    out.square().sum().backward()
    grads = [x.grad, *(p.grad for block in blocks for p in block.parameters())]
    for block in blocks:
        block.zero_grad()
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("apart", [None, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_inputs_that_are_made_again_give_the_same_bits(device: str, apart: int | None) -> None:
    blocks = nn.ModuleList(Noisy() for _ in range(7)).to(device)
    expected = _placed(blocks, Offload(), device, apart)
    offload = Offload(every=3)
    for _ in range(2):  # the second step begins anew, though the first one's last stretch was not full
        for block in blocks:
            block.forwards = 0
        found = _placed(blocks, offload, device, apart)
        assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))
        # stretches begin at 0, 3, 6; something else between two parts begins one, too: at 0, 2, 5
        ends = {None: (2, 5, 6), 2: (1, 4, 6)}[apart]
        assert [b.forwards for b in blocks] == [1 if index in ends else 2 for index in range(7)]


@needs_gpu
def test_fewer_inputs_wait_in_main_memory() -> None:
    blocks, pinned = nn.ModuleList(Noisy() for _ in range(8)).cuda(), {}
    for every in (1, 4):
        offload = Offload(every=every)
        _placed(blocks, offload, "cuda")
        pinned[every] = offload.store.pinned
    assert pinned[4] < pinned[1]


@needs_gpu
def test_what_is_saved_leaves_the_gpu_and_wide_tensors_stay_where_that_is_asked() -> None:
    blocks = nn.ModuleList(Block() for _ in range(8)).cuda()
    held = {}
    for name, offload, largest in (("plain", None, None), ("all", Offload(), None), ("narrow", Offload(), 3 * MIB)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(blocks, offload, "cuda", largest)
        held[name] = torch.cuda.max_memory_allocated() - before
    assert held["all"] < held["narrow"] < held["plain"], held


@needs_gpu
def test_a_forward_without_a_backward_gives_its_memory_back_and_two_at_a_time_do_not_mix() -> None:
    blocks, offload = nn.ModuleList(Block() for _ in range(3)).cuda(), Offload()
    expected = _run(blocks, None, "cuda")
    torch.manual_seed(1)
    other = torch.randn(8192, 64, device="cuda", requires_grad=True)
    with offload.saving():
        kept = blocks[0](other)  # its backward comes after those of a whole step
    with offload.saving():
        blocks[1](other)  # and this one never
    assert all(torch.equal(a, b) for a, b in zip(_run(blocks, offload, "cuda"), expected))
    kept.square().sum().backward(retain_graph=True)
    first, other.grad = other.grad, None
    kept.square().sum().backward()
    assert first is not None and other.grad is not None and torch.equal(first, other.grad)
    plain = other.detach().requires_grad_()
    blocks[0](plain).square().sum().backward()
    assert plain.grad is not None and torch.equal(plain.grad, other.grad)


def test_copies_and_pickles_start_empty() -> None:
    offload = Offload()
    offload.store.free.append(torch.empty(3))
    assert not copy.deepcopy(offload).store.free and not pickle.loads(pickle.dumps(offload)).store.free
    assert not pickle.loads(pickle.dumps(HostStore())).free


def test_only_tensors_without_gaps_and_overlaps_move() -> None:
    x = torch.empty(4, 6)
    assert _dense(x) and _dense(x.T) and _dense(torch.empty(2, 1, 3).permute(2, 1, 0))
    assert not _dense(x[:, :5]) and not _dense(x[:1].expand(3, 6)) and not _dense(x[:, ::2])
