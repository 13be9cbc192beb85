"""State by name: what is stored, what is refused, and that nothing depends on positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensorkeep.training._names import Names
from tensorkeep.training.live_state import optimizer_state, put_optimizer, put_tensors, stored_tensors, undeclared
from tests.helpers import refused
from tests.run_states import equal


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 3) -> None:
    for seed in range(times):
        for number, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))
        optimizer.step()


def test_tied_weights_are_stored_once_and_buffers_with_them() -> None:
    tensors, ties = stored_tensors(Tied(), base=False)
    assert ties == {"head.weight": "embed.weight"}
    assert set(tensors) == {
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_weights_come_back_into_the_same_memory_and_ties_hold() -> None:
    one, other = Tied(), Tied()
    saved = {n: t.clone() for n, t in stored_tensors(one, base=False)[0].items()}
    places = {n: p.data_ptr() for n, p in other.named_parameters()}
    put_tensors(other, saved, base=False)
    assert equal(saved, stored_tensors(other, base=False)[0])
    assert places == {n: p.data_ptr() for n, p in other.named_parameters()} and other.head.weight is other.embed.weight


def test_with_a_base_only_what_trains_is_stored() -> None:
    model = Tied()
    model.embed.requires_grad_(False)
    tensors, _ = stored_tensors(model, base=True)
    assert "embed.weight" not in tensors and "head.weight" not in tensors and "norm.running_mean" in tensors


def replaced(model: Tied) -> None:
    model.norm.weight = nn.Parameter(torch.full((3,), 9.0))


def moved(model: Tied) -> None:
    model.norm.weight.data = torch.full((3,), 7.0)


def frozen(model: Tied) -> None:
    model.norm.weight.requires_grad_(False)


def untied(model: Tied) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())


def another(model: Tied) -> None:
    model.norm = nn.BatchNorm1d(3)


def grown(model: Tied) -> None:
    model.more = nn.Linear(2, 2)


def counted(model: Tied) -> None:
    model.norm.running_mean = torch.ones(3)


def filled(model: Tied) -> None:
    model.norm.late = torch.ones(2)


def emptied(model: Tied) -> None:
    model.norm.num_batches_tracked = None


def kept(model: Tied) -> None:
    del model.norm.passing
    model.norm.register_buffer("staying", torch.ones(2))


CHANGES = [lambda m: None, replaced, moved, frozen, untied, another, grown, counted, filled, emptied, kept]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base", [False, True])
def test_what_is_known_of_a_model_never_outlives_a_change_of_it(change: Any, base: bool) -> None:
    model, names = Tied(), Names()
    model.norm.register_buffer("late", None)
    model.norm.register_buffer("passing", torch.zeros(2), persistent=False)
    for _ in range(2):
        stored_tensors(model, base, names)
    change(model)
    found, ties = stored_tensors(model, base, names)
    wanted, others = stored_tensors(model, base)
    assert undeclared(model, names) == undeclared(model) == []
    assert list(found) == list(wanted) and ties == others and equal(found, wanted)
    assert all(found[n].data_ptr() == wanted[n].data_ptr() and not found[n].requires_grad for n in found)


def test_a_module_that_stores_what_it_does_not_hold_is_asked_every_time() -> None:
    class Counting(nn.Linear):
        asked = 0

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            self.asked += 1
            destination[f"{prefix}asked"] = torch.tensor(self.asked)

    model, names = nn.Sequential(Counting(2, 2)), Names()
    assert [int(stored_tensors(model, False, names)[0]["0.asked"]) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.bias"), "missing from the checkpoint: norm.bias (1)"),
        (lambda s: s.update(extra=torch.ones(1)), "not in the run: extra (1)"),
        (lambda s: s.update({"norm.bias": torch.ones(4)}), "different: norm.bias (float32 [4], now float32 [3])"),
        (
            lambda s: s.update({"norm.bias": torch.ones(3).half()}),
            "different: norm.bias (float16 [3], now float32 [3])",
        ),
    ],
)
def test_a_difference_is_refused_by_name_before_anything_changes(change, words: str) -> None:  # type: ignore[no-untyped-def]
    model = Tied()
    saved = {n: t.clone() + 1 for n, t in stored_tensors(model, base=False)[0].items()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    change(saved)
    with refused("K01", words):
        put_tensors(model, saved, base=False)
    assert equal(before, dict(model.state_dict()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor])
def test_optimizer_state_goes_by_name_whatever_the_order(kind: type[torch.optim.Optimizer]) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    one, other = Tied(), Tied()
    put_tensors(other, {n: t.clone() for n, t in stored_tensors(one, base=False)[0].items()}, base=False)
    first = kind(one.parameters(), lr=0.1, **options)
    stepped(one, first)
    parameters = list(other.parameters())
    second = kind([{"params": parameters[:1]}, {"params": parameters[:0:-1]}], lr=0.1, **options)
    tensors, document = optimizer_state(one, first)
    put_tensors(other, {n: t.clone() for n, t in stored_tensors(one, base=False)[0].items()}, base=False)
    put_optimizer(other, second, tensors, document)
    again, _ = optimizer_state(other, second)
    assert equal({n: t.cpu() for n, t in tensors.items()}, again)
    assert all(again[n].data_ptr() != t.data_ptr() for n, t in tensors.items())  # copies: the two go separate ways
    grads = {n: torch.ones_like(p) for n, p in one.named_parameters()}
    for model, optimizer in ((one, first), (other, second)):
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].clone()
        optimizer.step()
    assert equal(dict(one.named_parameters()), dict(other.named_parameters()))


def test_state_of_another_kind_or_of_other_parameters_is_refused() -> None:
    model = Tied()
    adam = torch.optim.AdamW(model.parameters())
    stepped(model, adam, 1)
    tensors, document = optimizer_state(model, adam)
    with refused("R04", "AdamW, the run uses SGD"):
        put_optimizer(model, torch.optim.SGD(model.parameters()), tensors, document)
    with refused("K01", "not in the run: embed.weight"):
        put_optimizer(model, torch.optim.AdamW(model.norm.parameters()), tensors, document)
