"""`training.quantize_compute: fp8`: what is rounded and how far, CPU beside GPU, and what it leaves alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorkeep.adapters.lora import add_lora, merge_
from tensorkeep.errors import TensorkeepError
from tensorkeep.language._gated_layers import fuse_mlps
from tensorkeep.language._memory_plan import needed
from tensorkeep.language._recompute import lean
from tensorkeep.language.recipe_text import language_recipe
from tensorkeep.quantization import float8
from tensorkeep.quantization.frozen import float8_weight, frozen_state
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import compute_in_float8
from tensorkeep.training import saver as checkpoint
from tests.gpu import DEVICES, needs_gpu
from tests.test_gated_mlp import ALL, _layer, _reference
from tests.test_memory import _document, _losses
from tests.test_memory_plan import LLAMA, Way

HALF_STEP = 2**-4  # of e4m3 at most, of a number
SMALLEST = 2**-10  # half of e4m3's smallest step


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())


def _quantized(rows: int, columns: int, spread: bool = False, block: int = 64, double: bool = True) -> QuantLinear:
    torch.manual_seed(3)
    linear = nn.Linear(columns, rows)
    if spread:  # rows and blocks of columns between 1e-3 and 1e3
        with torch.no_grad():
            linear.weight *= torch.logspace(-3, 0, rows)[:, None] * torch.logspace(0, 3, columns)
    return QuantLinear.of(linear, "nf4", double=double, block=block)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "block", "double"), [(48, 192, 64, True), (160, 96, 32, False)])
def test_a_weight_is_rounded_by_rows_and_by_columns(
    device: str, rows: int, columns: int, block: int, double: bool
) -> None:
    layer = _quantized(rows, columns, True, block, double)
    layer.compute_in_float8()
    exact, (how, state) = layer.dequantize(torch.float32).double(), frozen_state(layer)
    there, moved = frozen_state(copy.deepcopy(layer).to(device))
    for turned, wanted in ((False, exact), (True, exact.T)):
        codes, scale = float8_weight(how, state, turned), state[6 + turned].double()[:, None]
        bound = (wanted.abs() * HALF_STEP).maximum(scale * SMALLEST) * 1.0001
        assert bool(((codes.double() * scale - wanted).abs() <= bound).all())
        assert float((codes.float().abs().amax(1) - float8.LARGEST).abs().max()) == 0  # each row fills the range
        on_device = float8_weight(there, moved, turned)
        assert torch.equal(on_device.cpu().view(torch.uint8), codes.contiguous().view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_rounded_by_their_largest_number(device: str) -> None:
    torch.manual_seed(0)
    for columns in (40, 20000):
        x = (torch.randn(7, columns) * torch.logspace(-20, 20, 7)[:, None]).to(torch.bfloat16)
        x[1] = 0
        codes, scale = float8.narrowed(x)
        wide = x.double()
        bound = (wide.abs() * HALF_STEP).maximum(scale.double() * SMALLEST) * 1.0001
        assert bool(((codes.double() * scale - wide).abs() <= bound).all())
        parts = torch.cat([x, x], 1).to(device)[:, :columns]  # rows lie apart
        there, scale_there = float8.narrowed(parts)
        assert torch.equal(there.cpu().view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(scale_there.cpu(), scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen(device: str, bad: float) -> None:
    x = torch.ones(16, 32, device=device, dtype=torch.bfloat16)
    x[3, 5] = bad
    weight, scale = float8.narrowed(torch.ones(16, 32, device=device))
    codes, tops = float8.narrowed(x)
    found = float8.product(codes, weight.T, tops, scale[:, 0], torch.bfloat16)
    assert not bool(found[3].isfinite().any()) and bool((found[[0, 15]] == 32).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_that_of_the_rounded_numbers(device: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(100, 512), torch.randn(96, 512)
    (left, ls), (right, rs) = float8.narrowed(x.to(device)), float8.narrowed(w.to(device))
    found = float8.product(left, right.T, ls, rs[:, 0], torch.bfloat16)
    rounded = (left.double() * ls) @ (right.double() * rs).T
    assert _off(found, rounded.cpu()) < 4e-3  # bfloat16's rounding
    assert _off(found, x.double() @ w.double().T) < 0.045
    assert float8.product(left[:0], right.T, ls[:0], rs[:, 0], torch.bfloat16).shape == (0, 96)


def _drawn(out: Tensor) -> Tensor:
    """A gradient of an output."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def _ramp(out: Tensor) -> Tensor:
    """The gradient that `_reference` takes."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)


def _run(layer: nn.Module, x: Tensor, device: str, ramp: bool = False) -> dict[str, Tensor]:
    """The output in training, and the gradients of the input and of what trains."""
    x = x.to(device, torch.bfloat16).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(x)
    (out.double() * (_ramp(out) if ramp else _drawn(out)).to(device)).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}
    layer.zero_grad()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapted", [True, False])
def test_a_linear_is_near_float64_and_so_are_its_gradients(device: str, adapted: bool) -> None:
    layer = nn.Sequential(_quantized(96, 128)).requires_grad_(False)
    if adapted:
        add_lora(layer, ["0"], r=4, alpha=8)
        nn.init.normal_(layer[0].lora_B, std=0.05)  # type: ignore[union-attr,arg-type]
    layer = layer.to(device)
    plain = copy.deepcopy(layer)
    assert compute_in_float8(layer) == ["0"]
    torch.manual_seed(4)
    x = torch.randn(2, 150, 128)
    found, other = _run(layer, x, device), _run(plain, x, device)
    own: Any = layer[0]
    x64 = x.to(torch.bfloat16).double().requires_grad_()
    leaves = {"x": x64}
    exact = F.linear(x64, own.dequantize().cpu().double(), own.bias.detach().cpu().double())
    if adapted:
        leaves["0.lora_A"], leaves["0.lora_B"] = (
            t.detach().cpu().double().requires_grad_() for t in (own.lora_A, own.lora_B)
        )
        exact = exact + own.scale * F.linear(F.linear(x64, leaves["0.lora_A"]), leaves["0.lora_B"])
    (exact * _drawn(exact)).sum().backward()
    assert 0.005 < _off(found["out"], exact.detach()) < 0.045  # it is in float8
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert _off(found[name], leaf.grad) < (0.045 if name == "x" else 0.01), name
    if adapted:  # the updates' gradients are made of numbers that were not rounded
        assert all(torch.equal(found[n], other[n]) for n in ("0.lora_A", "0.lora_B"))


def test_gradients_of_small_columns_are_as_near_as_those_of_large_ones() -> None:
    layer = nn.Sequential(_quantized(64, 256, spread=True)).requires_grad_(False)
    compute_in_float8(layer)
    torch.manual_seed(5)
    found = _run(layer, torch.randn(64, 256), "cpu")["x"].double()
    exact = _drawn(torch.empty(64, 64)) @ layer[0].dequantize().double()  # type: ignore[operator]
    off = (found - exact).norm(dim=0) / exact.norm(dim=0)
    assert float(off.max()) < 0.06


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keeps", [None, True, False])
def test_a_gated_mlp_is_near_float64(device: str, keeps: bool | None) -> None:
    layer = _layer("nf4", ALL).to(device)
    exact = _reference(layer, 600, 64)
    plain = copy.deepcopy(layer)
    compute_in_float8(layer)
    if keeps is not None:
        fuse_mlps([layer, plain], [keeps, keeps])
    torch.manual_seed(2)
    x = torch.randn(2, 300, 64)
    found, other = _run(layer, x, device, True), _run(plain, x, device, True)
    for name, value in exact.items():
        assert _off(found[name], value) < 0.07, name
        assert _off(other[name], value) < 0.01, name
        assert not torch.equal(found[name], other[name])


@pytest.mark.parametrize("keeps", [True, False])
def test_chunks_of_tokens_do_not_change_it(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorkeep.language import _gated_mlp

    layer = _layer("nf4", ["up_proj", "down_proj"])
    compute_in_float8(layer)
    fuse_mlps([layer], [keeps])
    x = torch.randn(2, 300, 64)
    whole = _run(layer, x, "cpu")
    monkeypatch.setattr(_gated_mlp, "CHUNK_BYTES", 2 * 160 * 2 * 256)  # 256 tokens at a time
    found = _run(layer, x, "cpu")
    for name, value in whole.items():
        assert _off(found[name], value.double()) < 0.02, name
    assert torch.equal(found["out"], whole["out"])


@needs_gpu
def test_cpu_and_gpu_agree() -> None:
    layer = _layer("nf4", ALL)
    compute_in_float8(layer)
    fuse_mlps([layer], [False])
    torch.manual_seed(2)
    x = torch.randn(2, 300, 64)
    here, there = _run(copy.deepcopy(layer), x, "cpu"), _run(layer.cuda(), x, "cuda")
    for name, value in here.items():
        assert _off(there[name], value.double()) < 0.02, name


def test_only_training_in_bfloat16_is_touched() -> None:
    layer = _layer("nf4", ALL)
    plain = copy.deepcopy(layer)
    compute_in_float8(layer)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), plain(x))  # float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(layer(x), plain(x))
        with torch.no_grad():
            assert torch.equal(layer(x), plain(x))
    state = plain.state_dict()
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    for one in (layer, plain):
        merge_(one)
    assert torch.equal(layer.mlp.up_proj.merged, plain.mlp.up_proj.merged)  # type: ignore[arg-type,union-attr]


def test_scales_belong_to_the_codes_and_keep_their_dtype() -> None:
    layer, other = _quantized(32, 64), _quantized(32, 64, spread=True)
    layer.compute_in_float8()
    other.compute_in_float8()
    layer.half()
    layer.load_state_dict(other.state_dict())
    for role in float8.ROLES:
        assert layer.get_buffer(role).dtype == torch.float32
        assert torch.equal(layer.get_buffer(role), other.get_buffer(role))
    assert torch.equal(copy.deepcopy(layer).get_buffer(float8.ROLES[0]), other.get_buffer(float8.ROLES[0]))


@pytest.mark.parametrize("memory", ["least"])
def test_a_run_trains_in_float8_and_goes_on_exactly(tmp_path: Path, memory: str | None) -> None:
    document = _document(tmp_path, memory, precision="bf16", deterministic=True, ema=0.9)
    expected = _losses(document, tmp_path / "plain")
    said: list[str] = []
    document["training"]["quantize_compute"] = "fp8"
    whole = _losses(document, tmp_path / "whole", said=said)
    assert whole != expected and whole == pytest.approx(expected, rel=0.01)
    assert any(line.startswith("quantize_compute: 14 linears") for line in said)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoint.run_folder.delete(tmp_path / "cut", [4])
    _losses(document, tmp_path / "cut")
    found = [checkpoint.newest(tmp_path / name) for name in ("whole", "cut")]
    one, other = [state[0] for state in found if state is not None]
    assert one.model and all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    assert one.ema and other.ema and str(one.ema) == str(other.ema)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ([("training.precision", "fp32")], "the rest is computed in bf16"),
        ([("adapter", "null"), ("quantize_backbone", "null")], "only frozen linears"),
        ([("training.parallel", "fsdp")], "sharded codes"),
        ([("objective", "dpo")], "a pair's two losses"),
        ([("quantize_compute", "fp4")], "not one of"),
    ],
)
def test_where_it_means_nothing_it_is_refused(tmp_path: Path, changes: list[tuple[str, str]], what: str) -> None:
    document = _document(tmp_path, None, precision="bf16", quantize_compute="fp8")
    assert language_recipe(document).training.quantize_compute == "fp8"
    with pytest.raises(TensorkeepError, match=what) as caught:
        language_recipe(document, changes)
    assert "quantize_compute" in caught.value.line


def test_a_model_without_fitting_codes_is_refused(tmp_path: Path) -> None:
    for kind in (None, "int8"):
        document = _document(tmp_path, None, precision="bf16", quantize_compute="fp8", quantize_backbone=kind)
        with pytest.raises(TensorkeepError, match="none has 4-bit codes"):
            _losses(document, tmp_path / f"run-{kind}")
    with pytest.raises(TensorkeepError, match="multiples of 16"):
        compute_in_float8(nn.Sequential(QuantLinear.of(nn.Linear(64, 24))))


def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    why = float8.why_not.__wrapped__
    assert why(gpu) == "NVIDIA A100 has compute capability 8.0, float8 products need 8.9"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "NVIDIA GPUs" in (why(gpu) or "") and "NVIDIA GPUs" in (why(torch.device("mps")) or "")
    assert why(torch.device("cpu")) is None


@needs_gpu
def test_the_gpu_here_is_tried_before_it_is_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    if torch.cuda.get_device_capability() >= (8, 9):
        assert float8.why_not(gpu) is None
        monkeypatch.setattr(float8, "product", lambda left, right, *_: (left.float() @ right.float()) * 2)
        assert "wrong by" in (float8.why_not.__wrapped__(gpu) or "")


def test_the_plan_knows_that_rounded_weights_are_smaller() -> None:
    way = Way(0, "queries", rows=True)
    plain, narrow = (needed(LLAMA._replace(float8=on), 2048, way)["one layer's work"] for on in (False, True))
    assert narrow < plain


@pytest.mark.slow
def test_compiled_a_layer_agrees() -> None:
    layer = _layer("nf4", ALL)
    compute_in_float8(layer)
    fuse_mlps([layer], [False])
    torch.manual_seed(2)
    x = torch.randn(2, 10, 64)
    expected = _run(layer, x, "cpu")
    lean([layer], "queries", compiled=True)
    found = _run(layer, x, "cpu")
    for name, value in expected.items():
        assert _off(found[name], value.double()) < 0.02, name
    apart = _layer("nf4", ALL)  # three linears on their own
    compute_in_float8(apart)
    expected = _run(apart, x, "cpu")
    lean([apart], "queries", compiled=True)
    found = _run(apart, x, "cpu")
    for name, value in expected.items():
        assert _off(found[name], value.double()) < 0.02, name
