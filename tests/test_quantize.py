"""Codes equal bitsandbytes' bit for bit; a quantized linear keeps them through everything a module goes through."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.memory import view_of
from tensorkeep.formats.view import read
from tensorkeep.quantization import encoding as quant_encoding
from tensorkeep.quantization.frozen import frozen_linear
from tensorkeep.quantization.linear import QuantLinear
from tensorkeep.quantization.modules import adopt, check_ranks, is_bitsandbytes, model_sizes, quantize_
from tensorkeep.quantization.packed import KINDS, kind_of, offset_of, pack, state_text
from tensorkeep.quantization.reading import read_packed
from tensorkeep.quantization.stored import dequantize, find_quantized
from tensorkeep.quantization.unpacking import dequantize_4bit, unpack
from tensorkeep.training.ema import Ema
from tests.gpu import DEVICES

DATA = Path(__file__).parent / "data/bitsandbytes_codes.safetensors"
VIEW = read(DATA)
CASES = sorted({n.rpartition(".layer.")[0] for n in VIEW if ".layer." in n})


def stored(case: str) -> dict[str, Tensor]:
    return {n[len(case) + 1 :]: VIEW.tensor(n) for n in VIEW if n.startswith(f"{case}.layer.")}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def linear(rows: int, columns: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False)


def layer_of(kind: str, rows: int = 24, columns: int = 96, seed: int = 0, double: bool = True) -> QuantLinear:
    return QuantLinear.of(linear(rows, columns, seed), kind_of(kind), double)


# -- the codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_state_equal_those_of_bitsandbytes_bit_for_bit(case: str) -> None:
    name, _, how = case.partition(".")
    weight, theirs = VIEW.tensor(f"{name}.weight"), stored(case)
    kind = kind_of(how.split("_")[0])
    packed = pack(weight, kind, "_dq" in how)
    if kind == "int8":
        assert same_bits(packed.tensors["weight"], theirs["layer.weight"])
        assert same_bits(packed.tensors["SCB"], theirs["layer.SCB"])
        return
    codes = theirs["layer.weight"].view(-1).view(torch.uint8)[: packed.tensors["weight"].numel()]
    assert torch.equal(packed.tensors["weight"].view(-1), codes)
    roles = [role for role in packed.tensors if role not in ("weight", "nested_offset")]
    assert {f"layer.weight.{r}" for r in roles} == {n for n in theirs if n != "layer.weight" and "quant_state" not in n}
    for role in roles:
        assert same_bits(packed.tensors[role], theirs[f"layer.weight.{role}"]), role
    text = bytes(theirs[f"layer.weight.quant_state.bitsandbytes__{kind}"].tolist())
    assert text == state_text(packed.layout, offset_of(packed))


@pytest.mark.parametrize("case", CASES)
def test_values_equal_the_numpy_reader_and_bitsandbytes_bit_for_bit(case: str) -> None:
    tensors = stored(case)
    packed = read_packed(tensors, None)
    values = unpack(packed.layout, packed.tensors)
    assert torch.equal(values, torch.from_numpy(dequantize(view_of(tensors), "layer.weight")))
    if f"{case}.values" in VIEW:
        assert torch.equal(values, VIEW.tensor(f"{case}.values"))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(unpack(packed.layout, packed.tensors, dtype), values.to(dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 33), (64, 64), (3, 7), (140, 96)])
def test_tools_and_live_models_quantize_to_the_same_values(kind: Any, double: bool, shape: tuple[int, int]) -> None:
    weight = linear(*shape, seed=3).weight.detach()
    packed = pack(weight, kind, double)
    tools = quant_encoding.through(weight.numpy(), quant_encoding.Encoding(kind, 64, double))
    assert torch.equal(unpack(packed.layout, packed.tensors), torch.from_numpy(tools).view(shape))


def test_codes_do_not_depend_on_the_number_of_threads() -> None:
    weight = linear(1536, 1600).weight.detach()  # more scales than torch adds in one thread
    threads, made = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        made.append(pack(weight))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(same_bits(tensor, made[1].tensors[role]) for role, tensor in made[0].tensors.items())
    assert offset_of(made[0]) == float(quant_encoding.mean(quant_encoding.absolute_maxima(weight.view(-1).numpy(), 64)))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    kind=st.sampled_from(KINDS),
    double=st.booleans(),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_quantizing_what_was_dequantized_changes_no_value(
    rows: int, columns: int, kind: Any, double: bool, block: int, dtype: torch.dtype, seed: int
) -> None:
    weight = linear(rows, columns, seed).weight.to(dtype)
    packed = pack(weight, kind, double, block)
    values = unpack(packed.layout, packed.tensors)
    assert values.shape == weight.shape
    error = (values - weight.float()).abs().amax() / weight.float().abs().amax()
    assert error < (0.01 if kind == "int8" else 0.5)
    if not double and kind != "int8":
        again = pack(values, kind, double, block)
        assert torch.equal(unpack(again.layout, again.tensors), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_refused_by_name(kind: Any, bad: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 3] = bad
    with pytest.raises(TensorkeepError, match=r"V01 up_proj: NaN or infinity"):
        pack(weight, kind, name="up_proj")


def test_what_is_no_weight_and_what_is_no_kind_are_refused() -> None:
    for wrong in (torch.ones(4), torch.ones(4, 4, dtype=torch.float64), torch.empty(0, 4)):
        with pytest.raises(TensorkeepError, match="cannot be quantized"):
            pack(wrong)
    with pytest.raises(TensorkeepError, match="did you mean nf4"):
        kind_of("nf5")
    with pytest.raises(TensorkeepError, match="block size 48"):
        pack(torch.ones(4, 64), block=48)


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 96), (10, 33), (1, 1)])
def test_forward_and_gradients_are_those_of_the_dense_weight_bitwise(kind: str, shape: tuple[int, int]) -> None:
    layer = layer_of(kind, *shape)
    layer.bias.requires_grad_()  # type: ignore[union-attr]
    x = torch.randn(2, 5, shape[1])
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()  # type: ignore[union-attr]
    out, wanted = layer(ours), F.linear(dense, layer.dequantize(), bias)
    assert torch.equal(out, wanted)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    assert torch.allclose(ours.grad, dense.grad, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(layer.bias.grad, bias.grad, rtol=1e-6)  # type: ignore[union-attr,arg-type]
    assert torch.equal(layer.eval()(x), out)  # train and eval compute the same


def test_gradients_pass_gradcheck_in_float64_with_a_low_rank_update() -> None:
    layer = layer_of("nf4", 6, 10).double()
    a, b = (
        torch.randn(2, 10, dtype=torch.float64, requires_grad=True),
        torch.randn(6, 2, dtype=torch.float64, requires_grad=True),
    )
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: frozen_linear(t[0], layer, t[1], t[2], 0.7), (x, a, b))


def test_the_dequantized_weight_is_never_kept() -> None:
    layer, x = layer_of("nf4"), torch.randn(3, 96, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.numel() < 24 * 96 for t in kept)
    assert {id(t) for t in kept} <= {id(t) for t in layer.buffers()}


def test_autocast_computes_in_its_dtype_and_returns_the_gradient_in_that_of_the_input() -> None:
    layer, x = layer_of("nf4"), torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        wanted = F.linear(x, layer.dequantize(), layer.bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer.bias.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_casts_deepcopy_pickle_and_moves_never_touch_codes_or_scales(kind: str) -> None:
    layer = layer_of(kind)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layers = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = layer_of(kind, seed=9)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for made in [*layers, fresh]:
        made.half().float().to(torch.bfloat16).to("cpu").share_memory()
        made.float()
        after = made.state_dict()
        assert after.keys() == before.keys()
        for name in before.keys() - {"bias"}:
            assert same_bits(after[name], before[name]), name
    with pytest.raises(TensorkeepError, match="cannot be converted"):
        layer.type(torch.float32)
    assert not any(p.requires_grad for p in layer.requires_grad_(True).parameters() if p is not layer.bias)
    assert layer_of(kind).to("meta").to_empty(device="cpu").weight.shape == layer.weight.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_one_graph_and_computes_the_same(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 96, requires_grad=True)
    made = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(made, layer(x))
    made.sum().backward()
    got, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(got, x.grad)  # type: ignore[arg-type]


def test_the_operation_has_the_shape_it_promises_under_tracing() -> None:
    packed = pack(torch.randn(5, 33), "nf4")
    t = packed.tensors
    arguments = (
        t["weight"],
        t["absmax"],
        t["quant_map"],
        t["nested_absmax"],
        t["nested_quant_map"],
        t["nested_offset"],
    )
    from tensorkeep.quantization.unpacking import _dequantize_4bit_op

    torch.library.opcheck(
        _dequantize_4bit_op, (*arguments, 64, 256, 5, 33, torch.float32), test_utils=("test_schema", "test_faketensor")
    )
    assert dequantize_4bit(*arguments, 64, 256, 5, 33, torch.bfloat16).dtype == torch.bfloat16


# -- state dicts ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 140),
    kind=st.sampled_from(KINDS),
    double=st.booleans(),
    other=st.sampled_from(KINDS),
    other_double=st.booleans(),
    storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_state_dicts_load_strictly_into_layers_of_any_seed_kind_and_storage(
    rows: int, columns: int, kind: str, double: bool, other: str, other_double: bool, storage: torch.dtype
) -> None:
    layer = layer_of(kind, rows, columns, double=double)
    state = layer.state_dict()
    if kind != "int8" and storage != torch.uint8:
        # bitsandbytes with quant_storage: the same bytes under another dtype, filled up to whole elements
        codes = state["weight"].view(-1)
        state["weight"] = F.pad(codes, (0, -codes.numel() % storage.itemsize)).view(storage).view(-1, 1)
    fresh = layer_of(other, rows, columns, seed=5, double=other_double)
    fresh.load_state_dict(state, strict=True)
    assert fresh.kind == kind and torch.equal(fresh.dequantize(), layer.dequantize())
    x = torch.randn(2, columns)
    assert torch.equal(fresh(x), layer(x))


def test_names_are_those_of_bitsandbytes_and_a_digest() -> None:
    four = {
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight_digest",
        "bias",
    }
    assert set(layer_of("nf4").state_dict()) == four
    assert set(layer_of("int8").state_dict()) == {"weight", "SCB", "weight_format", "weight_digest", "bias"}
    found = find_quantized(view_of({f"m.{k}": v for k, v in layer_of("nf4").state_dict().items()}))
    assert found["m.weight"].shape == (24, 96) and not found["m.weight"].problems


def damaged(how: str) -> dict[str, Tensor]:
    state, other = layer_of("nf4", double=False).state_dict(), layer_of("nf4", seed=8, double=False).state_dict()
    if how == "scales of another":
        state["weight.absmax"] = other["weight.absmax"]
    elif how == "codes of another":
        state["weight"] = other["weight"]
    elif how == "no scales":
        del state["weight.absmax"]
    elif how == "no state":
        state = {k: v for k, v in state.items() if k in ("weight", "bias")}
    elif how == "transposed":
        state["weight.absmax"] = state["weight.absmax"].view(12, -1).T.contiguous().bfloat16()
    elif how == "another shape":
        state = layer_of("nf4", 96, 24).state_dict()
    elif how == "float":
        state = linear(24, 96).state_dict()
    elif how == "averaged":
        state["weight"] = state["weight"].clone()
        state["weight"][3] += 1
    return state


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("scales of another", "Q02"),
        ("codes of another", "Q02"),
        ("averaged", "Q02"),
        ("no scales", "Q01"),
        ("no state", "Q01"),
        ("transposed", "Q06"),
        ("another shape", "S01"),
        ("float", "Q01"),
    ],
)
def test_damaged_and_foreign_states_are_refused_and_nothing_is_copied(how: str, code: str) -> None:
    layer = layer_of("nf4", seed=4)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=code):
        layer.load_state_dict(damaged(how))
    assert all(same_bits(v, before[k]) for k, v in layer.state_dict().items())


def test_missing_and_unexpected_names_stay_errors() -> None:
    state = layer_of("nf4").state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer_of("nf4").load_state_dict({**state, "extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.absmax"):
        layer_of("nf4").load_state_dict({"bias": state["bias"]})


# -- models -----------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 64),
            "up": nn.Linear(64, 96),
            "down": nn.Linear(96, 64),
            "norm": nn.LayerNorm(64),
            "lm_head": nn.Linear(64, 20, bias=False),
        }
    )
    made["lm_head"].weight = made["embed"].weight  # type: ignore[assignment]
    return made


def test_heads_tied_and_trainable_linears_keep_their_floats() -> None:
    frozen = model().requires_grad_(False)
    assert quantize_(frozen, exclude=()) == ["up", "down"]
    assert frozen["lm_head"].weight is frozen["embed"].weight  # type: ignore[index]
    partly = model().requires_grad_(False)
    partly["up"].requires_grad_(True)  # type: ignore[index]
    assert quantize_(partly, 8) == ["down"] and partly["down"].kind == "int8"  # type: ignore[index]
    with pytest.raises(TensorkeepError, match="2 train"):
        quantize_(model(), exclude=("lm_head",))
    with pytest.raises(TensorkeepError, match="did you mean up"):
        quantize_(model(), include=("upp",))


def test_sizes_count_logical_parameters_and_stored_bytes() -> None:
    made = model().requires_grad_(False)
    dense = model_sizes(made)
    quantize_(made)
    found = model_sizes(made)
    assert found.parameters == dense.parameters == sum(p.numel() for p in model().parameters())
    assert found.quantized == 2 * 64 * 96 and found.trainable == 0
    assert found.bytes < dense.bytes - 2 * 64 * 96 * 3
    assert "quantized" in str(found)


def test_an_average_of_a_quantized_model_holds_no_code_and_changes_none() -> None:
    made = nn.Sequential(layer_of("nf4"), nn.Linear(24, 4))
    before = {k: v.clone() for k, v in made[0].state_dict().items()}
    ema = Ema(made, decay=0.5)
    assert sorted(ema.tensors) == ["1.bias", "1.weight"]
    with torch.no_grad():
        made[1].weight += 1
    ema.update(made)
    with ema.applied(made):
        made(torch.randn(2, 96))
    assert all(same_bits(v, before[k]) for k, v in made[0].state_dict().items())


def test_codes_that_changed_in_memory_are_found() -> None:
    made = nn.Sequential(layer_of("nf4"), layer_of("int8", 8, 24))
    check_ranks(made)
    made[1].SCB[2] *= 2
    with pytest.raises(TensorkeepError, match=r"Q02 1: codes and scales changed"):
        check_ranks(made)


# -- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False), ("int8", False)])
def test_adopted_layers_of_bitsandbytes_keep_every_bit(kind: str, double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    dense = linear(24, 128)
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False)
        theirs.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        theirs = bnb.nn.Linear4bit(128, 24, quant_type=kind, compress_statistics=double)
        theirs.weight = bnb.nn.Params4bit(
            dense.weight.data, requires_grad=False, quant_type=kind, compress_statistics=double, module=theirs
        )
    theirs.bias = dense.bias
    holder = nn.Sequential(theirs)
    assert is_bitsandbytes(theirs)
    if kind != "int8":
        with pytest.raises(TensorkeepError, match="Q01 0: holds floats still"):
            adopt(holder)
    holder.to("cpu")
    saved = {k: v.clone() for k, v in holder.state_dict().items()}
    x = torch.randn(4, 128)
    wanted = holder.train()(x) if kind != "int8" else None
    assert adopt(holder) == ["0"] and isinstance(holder[0], QuantLinear)
    for name, tensor in saved.items():
        assert same_bits(holder.state_dict()[name], tensor), name
    if wanted is not None:
        assert torch.equal(holder(x), wanted)


def test_a_layer_repacked_for_one_kernel_is_not_adopted() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False).to("cpu")
    theirs.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(
        theirs.weight.data, theirs.weight.quant_state
    )
    theirs.weight.quant_state = state
    with pytest.raises(TensorkeepError, match="Q06 0"):
        adopt(nn.Sequential(theirs))


def test_a_language_job_proves_its_codes_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace
    from typing import cast

    from tensorkeep.language._optimizer import choose_trainable
    from tensorkeep.quantization import modules

    def damaging(model: nn.Module, kind: str, **options: Any) -> list[str]:
        names = quantize_(model, kind, **options)  # type: ignore[arg-type]
        model.get_submodule(names[0]).SCB[2] *= 2  # type: ignore[operator]
        return names

    adapter = SimpleNamespace(
        targets=("all-linear",),
        lora_r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        rslora=False,
        target_parameters=(),
        quantize_aware=None,
    )
    training = SimpleNamespace(quantize_backbone="int8", seed=1)
    recipe = cast(Any, SimpleNamespace(trainable=("*",), adapter=adapter, training=training))
    choose_trainable(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), recipe)
    monkeypatch.setattr(modules, "quantize_", damaging)
    with pytest.raises(TensorkeepError, match="Q02 0: codes and scales changed"):
        choose_trainable(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), recipe)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_values_go_where_they_are_wanted_between_what_is_there(kind: Any, device: str) -> None:
    torch.manual_seed(0)
    for shape, block, double in (
        ((192, 256), 64, True),
        ((33, 100), 32, False),
        ((7, 13), 64, True),
        ((4, 4096), 4096, True),
    ):
        packed = pack(torch.randn(shape), kind, double, block)
        tensors = {role: tensor.to(device) for role, tensor in packed.tensors.items()}
        for dtype in (torch.float32, torch.bfloat16):
            expected = unpack(packed.layout, packed.tensors, dtype)
            wide = torch.full((shape[0], shape[1] + 24), 7.0, dtype=dtype, device=device)
            assert torch.equal(unpack(packed.layout, tensors, dtype).cpu(), expected)
            unpack(packed.layout, tensors, dtype, wide[:, : shape[1]])
            assert torch.equal(wide[:, : shape[1]].cpu(), expected) and bool((wide[:, shape[1] :] == 7).all())
