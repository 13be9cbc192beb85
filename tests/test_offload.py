"""What a backward pass needs waits in main memory and comes back as it was; on a CPU nothing moves."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
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
    """Saves its input, which its gradient needs, drops some, and returns a pair; counts its forwards."""

    forwards = 0

    def forward(self, x: Tensor) -> Any:
        self.forwards += 1
        return super().forward(nn.functional.dropout(x.sin(), 0.3)), None


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
                place.done(block, given)
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


class Turned(nn.Module):
    """Saves its input as it is, and turned: the same place, shape and dtype, but other strides."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() @ x.T


def _chained(parts: list[Callable[[Tensor], Any]], every: int, between: Callable[[int], Any]) -> list[Tensor]:
    """Output and gradient of parts, each of which may keep its input."""
    torch.manual_seed(0)
    offload, out = Offload(every=every), (x := torch.randn(64, 64, requires_grad=True))
    for index, part in enumerate(parts):
        between(index)
        with torch.autocast("cpu", torch.bfloat16, enabled=index != 1):
            place = offload.place(out)
            with offload.saving((), None, place):
                given = part(out)
        if place is not None:
            place.done(part, given)
        out = given if isinstance(given, Tensor) else given[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    return [out.detach(), grad]


CHAINS: dict[str, Callable[[], list[Callable[[Tensor], Any]]]] = {
    "some without autocast": lambda: [Noisy(), Noisy(), Noisy(), Noisy()],
    "first ones that save no input": lambda: [nn.Identity(), nn.Identity(), torch.sin, torch.exp, torch.sin],
    "turned inputs": lambda: [Turned(), Turned(), Turned()],
    "one part many times": lambda: [Noisy()] * 4,
}


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_made_again_is_what_was_there_whatever_lies_between(chain: str, draw: bool) -> None:
    parts = CHAINS[chain]()
    between = (lambda index: torch.rand(index)) if draw else lambda index: None
    for one, other in zip(_chained(parts, 1, between), _chained(parts, 4, between)):
        assert torch.equal(one, other)


def test_a_part_that_failed_and_is_tried_again_drew_its_own_random_numbers() -> None:
    parts = [Noisy() for _ in range(4)]
    made: list[Tensor] = []
    for every in (1, 4):
        offload = Offload(every=every)
        torch.manual_seed(0)
        out = x = torch.randn(64, 64, requires_grad=True)
        for part in parts:
            with pytest.raises(RuntimeError, match="must match"), offload.saving((), None, offload.place(out)):
                torch.rand(5) + nn.functional.dropout(out)
            place = offload.place(out)
            with offload.saving((), None, place):
                given = part(out)
            if place is not None:
                place.done(part, given)
            out = given[0]
        made += torch.autograd.grad(out.square().sum(), x)
    assert len(made) == 2 and torch.equal(made[0], made[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [8, 8192])
@pytest.mark.parametrize("every", [1, 2])
def test_a_saved_tensor_that_is_changed_in_place_is_an_error_as_it_is_without_offloading(
    every: int, rows: int, device: str
) -> None:
    offload, x = Offload(every=every), torch.randn(rows, 64, device=device, requires_grad=True)
    taken = x * 1
    with offload.saving((), None, offload.place(taken)):
        out = taken.sin()
    taken.detach().mul_(2)
    with pytest.raises(TensorkeepError, match="was changed in place after it was saved"):
        out.sum().backward()


@pytest.mark.parametrize("every", [1, 3])
def test_a_forward_without_a_backward_leaves_nothing(every: int) -> None:
    """An output that is saved must not hold the graph that saves it."""
    offload, out = Offload(every=every), torch.randn(8, 64, requires_grad=True)
    parts, gone = [nn.Softmax(-1), nn.Sigmoid(), Block(), nn.ReLU()], []
    for part in parts:
        place = offload.place(out)
        with offload.saving((), None, place):
            given = part(out)
        if place is not None:
            place.done(part, given)
        out = given
        gone.append(weakref.ref(given))
    del out, given, place
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


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
