from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tensorkeep.ema import Ema
from tensorkeep.errors import TensorkeepError


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    return model


def _step(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def test_only_trainable_float_tensors_are_held() -> None:
    ema = Ema(_model())
    assert set(ema.tensors) == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_average_follows_its_formula() -> None:
    model = _model()
    ema = Ema(model, decay=0.9)
    wanted = {name: tensor.double() for name, tensor in ema.tensors.items()}
    for seed in range(5):
        _step(model, seed)
        ema.update(model)
        for name, parameter in model.named_parameters():
            if name in wanted:
                wanted[name] = 0.9 * wanted[name] + 0.1 * parameter.detach().double()
    assert all(torch.allclose(ema.tensors[name].double(), wanted[name], atol=1e-6) for name in wanted)
    assert ema.updates == 5


def test_warm_up_raises_the_decay_to_its_end() -> None:
    ema = Ema(_model(), decay=0.999, warmup=True)
    decays = [ema.decay_at(n) for n in (0, 10, 100000)]
    assert decays == [0.1, 11 / 20, 0.999]


@pytest.mark.parametrize("fails", [False, True])
def test_the_swap_restores_every_bit_and_pointer(fails: bool) -> None:
    model = _model()
    ema = Ema(model)
    _step(model, 1)
    state = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    try:
        with ema.applied(model):
            assert all(torch.equal(dict(model.named_parameters())[name], average[name]) for name in average)
            if fails:
                raise RuntimeError("evaluation broke")
    except RuntimeError:
        assert fails
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name][0]) and tensor.data_ptr() == state[name][1]
    assert all(torch.equal(ema.tensors[name], average[name]) for name in average)


def test_training_goes_on_after_a_swap_as_if_there_had_been_none() -> None:
    finals = []
    for swaps in (False, True):
        torch.manual_seed(0)
        model = _model().eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ema = Ema(model)
        for step in range(4):
            model(torch.full((2, 4), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            if swaps:
                with ema.applied(model), torch.no_grad():
                    model(torch.ones(2, 4))
        finals.append((copy.deepcopy(model.state_dict()), copy.deepcopy(ema.tensors)))
    for one, two in zip(finals[0], finals[1]):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_average_goes_on_bitwise() -> None:
    model = _model()
    ema = Ema(model, warmup=True)
    for seed in range(3):
        _step(model, seed)
        ema.update(model)
    again = Ema(_model(), warmup=True)
    again.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()}, ema.updates)
    _step(model, 9)
    ema.update(model)
    again.update(model)
    assert all(torch.equal(ema.tensors[name], again.tensors[name]) for name in ema.tensors)


def test_half_precision_models_are_averaged_in_float32_and_swapped_in_their_own_dtype() -> None:
    model = _model().to(torch.bfloat16)
    ema = Ema(model, decay=0.999)
    for seed in range(3):
        _step(model, seed)
        ema.update(model)
    assert {tensor.dtype for tensor in ema.tensors.values()} == {torch.float32}
    with ema.applied(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_saved_averages_of_other_tensors_are_refused_by_name() -> None:
    ema = Ema(_model())
    state = ema.state_dict()
    state["0.weight"] = state.pop("2.bias")
    state["2.weight"] = torch.zeros(3)
    with pytest.raises(TensorkeepError, match=r"missing: 2\.bias.*unexpected: 0\.weight.*2\.weight \(3,\)"):
        ema.load_state_dict(state, 0)


def test_misuse_is_refused() -> None:
    model = _model()
    ema = Ema(model)
    with ema.applied(model):
        with pytest.raises(TensorkeepError, match="applied"):
            ema.update(model)
        with pytest.raises(TensorkeepError, match="applied already"), ema.applied(model):
            pass
    with pytest.raises(TensorkeepError, match=r"no parameter 2\.weight"):
        ema.update(model[:2])
    with pytest.raises(TensorkeepError, match="decay"):
        Ema(model, decay=1.0)
