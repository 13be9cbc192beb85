from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.training.ema import Ema
from tests.gpu import needs_gpu
from tests.helpers import refused


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


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("copy_", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_swap_restores_every_bit_and_pointer(
    error: type[BaseException] | None, copy_: bool, dtype: torch.dtype
) -> None:
    model = _model().to(dtype)
    ema = Ema(model)
    _step(model, 1)
    state = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    try:
        with ema.applied(model, copy=copy_):
            held = dict(model.named_parameters())
            assert all(torch.equal(held[name], average[name].to(dtype)) for name in average)
            assert not copy_ or all(held[name].data_ptr() == state[name][1] for name in average)
            if error is not None:
                raise error("evaluation broke")
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name][0]) and tensor.data_ptr() == state[name][1]
    assert all(torch.equal(ema.tensors[name], average[name]) for name in average)


def test_training_goes_on_after_a_swap_as_if_there_had_been_none() -> None:
    finals = []
    for swaps in ("", "pointer", "copy"):
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
                with ema.applied(model, copy=swaps == "copy"), torch.no_grad():
                    model(torch.ones(2, 4))
        finals.append((copy.deepcopy(model.state_dict()), copy.deepcopy(ema.tensors)))
    for other in finals[1:]:
        for one, two in zip(finals[0], other):
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
    with pytest.raises(TensorkeepError, match="no parameter of the model trains"):
        Ema(_model().requires_grad_(False))


def test_packed_codes_that_train_are_refused() -> None:
    model = _model()
    model[2].weight.quant_state = object()  # as bitsandbytes' codes in bf16 or fp32 storage have
    with refused("Q03", "2.weight", "packed codes"):
        Ema(model)
    model[2].weight.requires_grad_(False)
    assert "2.weight" not in Ema(model).tensors


def test_a_compiled_model_is_evaluated_under_the_average() -> None:
    model = _model().eval()
    compiled = torch.compile(model, backend="eager")
    ema, x = Ema(compiled), torch.ones(2, 4)
    start = compiled(x)
    _step(model, 1)
    moved = compiled(x)
    for copy_ in (False, True):
        with ema.applied(compiled, copy=copy_), torch.no_grad():
            assert torch.equal(compiled(x), start)
        assert torch.equal(compiled(x), moved)


def test_ddp_trains_on_as_without_a_swap(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        finals = []
        for swaps in (False, True):
            model = _model().eval()
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer, ema = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), Ema(wrapped)
            for step in range(3):
                wrapped(torch.full((2, 4), float(step))).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                ema.update(wrapped)
                if swaps:
                    with ema.applied(wrapped), torch.no_grad():
                        wrapped(torch.ones(2, 4))
            finals.append(copy.deepcopy(model.state_dict()) | {f"ema {n}": t for n, t in ema.tensors.items()})
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
    assert "ema 2.weight" in finals[0]


@needs_gpu
def test_an_average_in_main_memory_is_that_of_the_gpu() -> None:
    model = _model().cuda()
    there, here = Ema(model), Ema(model, device="cpu")
    for seed in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).cuda())
        there.update(model)
        here.update(model)
    assert all(tensor.is_pinned() for tensor in here.tensors.values())
    assert all(torch.allclose(there.tensors[n].cpu(), here.tensors[n], atol=1e-6) for n in here.tensors)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with here.applied(model):
        assert all(torch.equal(p.cpu(), here.tensors[n]) for n, p in model.named_parameters() if n in here.tensors)
    assert all(torch.equal(kept[n], p) for n, p in model.named_parameters())
