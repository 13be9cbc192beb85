"""Quantized weights of every packed kind: found, dequantised bit for bit, converted, compared, and told from noise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from tensorkeep.cli import main
from tensorkeep.conversion.planning import make_plan
from tensorkeep.diagnosis.checks import q07_codes_noise
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization import stored
from tensorkeep.quantization.kinds import packing
from tests import quant_kinds as made
from tests.helpers import refused, to, write_hf

LAYOUTS = sorted(made.LAYOUTS)
WEIGHT = "m.experts.down_proj"


def folder(path: Path, layout: str, w: torch.Tensor | None, **options: Any) -> tuple[Path, torch.Tensor, str]:
    """A folder with one weight, its values, and its name as a float."""
    tensors, values = made.made(layout, w, **options)
    config = {"quantization_config": made.CONFIGS.get(layout, {"quant_method": layout})}
    return write_hf(path, tensors, config), values, WEIGHT if layout == "mxfp4" else "m.weight"


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kind_is_found_counted_and_dequantised_bit_for_bit(layout: str, tmp_path: Path) -> None:
    path, values, name = folder(tmp_path / "q", layout, None)
    view = read(path)
    (weight,) = stored.find_quantized(view).values()
    assert (weight.kind, weight.stands_for, weight.problems) == (made.LAYOUTS[layout][2], name, ())
    assert weight.shape == tuple(values.shape)
    found = torch.from_numpy(stored.dequantize(view, weight.name, weight))
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))
    low, high = (1, 2) if layout == "mxfp4" else (13, 42)  # rows in the middle, in no whole words
    some = np.concatenate([v for _, v in stored.stream_values(view, weight, (low, high))])
    assert np.array_equal(some, values[low:high].reshape(-1).numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_a_cast_makes_floats_under_the_weights_own_name(layout: str, dtype: str, tmp_path: Path) -> None:
    path, values, name = folder(tmp_path / "q", layout, None)
    plan, _ = to(path, tmp_path / "out", "hf", dtype=dtype)
    torch_dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[dtype]
    assert {k: v.dtype for k, v in load_file(tmp_path / "out/model.safetensors").items()} == {name: torch_dtype}
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], values.to(torch_dtype))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    (step,) = [s for s in plan.steps if s.sink is not None]
    assert step.reason == f"dequantized {made.LAYOUTS[layout][2]}"
    given_up = {p.name for s in plan.dropped for p in s.parts}
    assert given_up | set(stored.find_quantized(read(path))) == set(read(path))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["hf", "dcp", "pth"])
def test_without_a_cast_codes_scales_and_config_are_kept(layout: str, form: str, tmp_path: Path) -> None:
    path, values, _ = folder(tmp_path / "q", layout, None)
    to(path, tmp_path / "out", form)
    ours, theirs = read(path), read(tmp_path / "out")
    assert {n: ours.digest(n) for n in ours} == {n.removeprefix("model."): theirs.digest(n) for n in theirs}
    if form == "hf":
        kept, said = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", path))
        assert kept["quantization_config"] == said["quantization_config"]
    (weight,) = stored.find_quantized(theirs).values()
    assert np.array_equal(stored.dequantize(theirs, weight.name, weight), values.numpy())


@given(
    bits=st.integers(1, 8),
    codes=st.lists(st.lists(st.integers(0, 255), min_size=45, max_size=45), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_codes_are_what_was_packed(bits: int, codes: list[list[int]]) -> None:
    wanted = np.array(codes) % (1 << bits)
    words = made.packed(wanted, bits).numpy()
    assert packing.words_for(45, bits) == words.shape[1]
    assert np.array_equal(packing.unpack(words, bits, 45), wanted)


@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_codes_of_any_kind_decode_to_what_was_packed(
    layout: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors, values = made.made(layout, None, seed=seed)
    path = tmp_path_factory.mktemp("codes")
    write_hf(path, tensors, {"quantization_config": made.CONFIGS.get(layout, {})})
    view = read(path)
    (name,) = stored.find_quantized(view)
    assert np.array_equal(stored.dequantize(view, name), values.numpy())


# -- as the reference implementations do ------------------------------------------------------------------------------


def test_mxfp4_is_bitwise_what_transformers_makes_of_every_byte(tmp_path: Path) -> None:
    mx = importlib.import_module("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (2, 8, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.arange(2 * 8 * 32, dtype=torch.int32).remainder(255).to(torch.uint8).reshape(2, 8, 32)
    path = write_hf(tmp_path / "q", {f"{WEIGHT}_blocks": blocks, f"{WEIGHT}_scales": scales}, {})
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        to(path, tmp_path / name, "hf", dtype=name)
        found = load_file(tmp_path / name / "model.safetensors")[WEIGHT]
        wanted = mx.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 96)])
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "exponents"])
def test_fp8_is_bitwise_what_transformers_makes_of_it(shape: tuple[int, ...], scale: str, tmp_path: Path) -> None:
    operation = importlib.import_module("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    name = "m.weight" if len(shape) == 2 else "m.experts.gate_up_proj"
    tensors, _ = made.fp8(made.trained(*shape), name.removesuffix(".weight"), name="weight" if len(shape) == 2 else "")
    grid = tensors[f"{name}_scale_inv"]
    if scale == "exponents":
        grid = (grid.log2().ceil() + 127).to(torch.uint8)
    tensors[f"{name}_scale_inv"] = grid = grid.to(getattr(torch, scale)) if scale != "exponents" else grid
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
    path = write_hf(tmp_path / "q", tensors, config)
    for word, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        to(path, tmp_path / word, "hf", dtype=word)
        found = load_file(tmp_path / word / "model.safetensors")
        assert torch.equal(found[name], operation._dequantize_one(tensors[name], grid, dtype))


def test_packed_kinds_are_bitwise_what_compressed_tensors_makes_of_them(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases = [("nvfp4", "nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor_group", group_size=16))]
    for bits in (2, 3, 4, 5, 8):
        usual = dict(num_bits=bits, type="int", strategy="group", group_size=32)
        cases += [("packed", "pack-quantized", usual), ("packed-zeros", "pack-quantized", usual | {"symmetric": False})]
    for number, (layout, form, words) in enumerate(cases):
        options = {"bits": words["num_bits"]} if layout != "nvfp4" else {}
        usual = {k: v for k, v in made.LAYOUTS[layout][1].items() if k != "bits"}
        tensors, _ = made.LAYOUTS[layout][0](None, **usual, **options, seed=number)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**words))
        compressor = BaseCompressor.get_value_from_registry(form)
        whole = {k.removeprefix("m."): v for k, v in tensors.items()}
        wanted = compressor.decompress(whole, scheme)["weight"]
        path = write_hf(tmp_path / str(number), tensors, {})
        (name,) = stored.find_quantized(read(path))
        assert torch.equal(torch.from_numpy(stored.dequantize(read(path), name)).to(wanted.dtype), wanted)


def test_mxfp4_of_linears_is_bitwise_what_compressed_tensors_makes_of_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    stacked, _ = made.mxfp4(None)
    codes, scales = (stacked[f"{WEIGHT}_{part}"][0] for part in ("blocks", "scales"))
    parts = {"weight_packed": codes.reshape(len(codes), -1), "weight_scale": scales}
    words = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=words)
    wanted = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(dict(parts), scheme)["weight"]
    view = read(write_hf(tmp_path, {f"m.{name}": part for name, part in parts.items()}, {}))
    (weight,) = stored.find_quantized(view).values()
    assert weight.kind == "mxfp4-packed"
    assert torch.equal(torch.from_numpy(stored.dequantize(view, weight.name)).to(wanted.dtype), wanted)


def test_bitsandbytes_in_a_pth_is_what_it_makes_of_it(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    stem = "model.layers.0.mlp.up_proj"
    for kind in ("nf4", "fp4", "int8"):
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(made.trained(64, 128), requires_grad=False, has_fp16_weights=False)
            layer = layer.to("cpu")
            state = {f"{stem}.{k}": v for k, v in layer.state_dict().items()}
            wanted = layer.weight.data.float() * layer.weight.SCB[:, None] * float(np.float32(7.874015718698502e-3))
        else:
            layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type=kind, compute_dtype=torch.float32)
            layer.weight = bnb.nn.Params4bit(made.trained(64, 128), requires_grad=False, quant_type=kind)
            layer = layer.to("cpu")
            state = {f"{stem}.{k}": v for k, v in layer.state_dict().items()}
            wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        torch.save({"model": state}, tmp_path / f"{kind}.pth")
        to(tmp_path / f"{kind}.pth", tmp_path / kind, "hf", dtype="F32")
        assert torch.equal(load_file(tmp_path / kind / "model.safetensors")[f"{stem}.weight"], wanted)


def test_gpt_oss_loads_kept_and_dequantised(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    GptOssForCausalLM(config).float().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        parts, _ = made.mxfp4(tensors.pop(name).transpose(1, 2).contiguous(), name)
        tensors |= parts
    document = json.loads((tmp_path / "base/config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    write_hf(tmp_path / "q", tensors, document)
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "kept"), "--to", "hf"]) == 0
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "floats"), "--to", "hf", "--dtype", "bf16"]) == 0
    ids, outputs = torch.arange(3, 20)[None], []
    for folder_ in ("q", "kept", "floats"):
        model, told = GptOssForCausalLM.from_pretrained(
            tmp_path / folder_, dtype=torch.bfloat16, output_loading_info=True
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        outputs.append(model.eval()(input_ids=ids).logits)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_conv1d_model_gets_its_matrices_back_the_way_it_keeps_them(tmp_path: Path) -> None:
    """Quantizers turn GPT-2's layers, which are [inputs, outputs], into linears."""
    w, name = made.trained(96, 128, seed=3), "transformer.h.0.attn.c_proj"
    tensors, values = made.gptq(w, name)
    path = write_hf(tmp_path / "q", tensors, {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq"}})
    to(path, tmp_path / "out", "dcp", dtype="F32")
    found = read(tmp_path / "out").array(f"{name}.weight")
    assert np.array_equal(found, values.T.numpy())
    floats = write_hf(tmp_path / "floats", {f"{name}.weight": w.T.contiguous()}, {"model_type": "gpt2"})
    assert diagnose(str(path), str(floats)).verdict == "ok"


# -- comparing and diagnosing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_equal_to_its_own_dequantised_model(layout: str, tmp_path: Path) -> None:
    path, _, _ = folder(tmp_path / "q", layout, None)
    for dtype in ("F32", "BF16"):
        to(path, tmp_path / dtype, "hf", dtype=dtype)
        for pair in ((path, tmp_path / dtype), (tmp_path / dtype, path)):
            assert {d.status for d in compare(read(pair[0]), read(pair[1]))} == {"equal"}
            found = diagnose(str(pair[0]), str(pair[1]))
            assert found.verdict == "ok", [(f.code, f.message) for f in found.findings]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_found_and_rounded_weights_are_not_noise(layout: str, tmp_path: Path) -> None:
    w = made.trained(3, 96, 128, seed=3) if layout == "mxfp4" else made.trained(96, 128, seed=3)
    for seed in range(3):
        path, _, name = folder(tmp_path / f"noise{seed}", layout, None, seed=seed)
        found = diagnose(str(path))
        assert [f.tensors for f in found.findings if f.code == "Q07" and f.severity == "error"] == [[name]]
        assert found.verdict == "findings"
    sound, _, name = folder(tmp_path / "sound", layout, w)
    alone = diagnose(str(sound))
    assert [f.message for f in alone.findings if f.code == "Q07"] == []
    assert alone.verdict == "inconclusive"  # nothing says that these scales are these codes'
    floats = write_hf(tmp_path / "floats", {name: w.transpose(1, 2).contiguous() if layout == "mxfp4" else w}, {})
    against = diagnose(str(sound), str(floats))
    assert against.verdict == "ok", [(f.code, f.message) for f in against.findings]
    other = write_hf(tmp_path / "other", {name: torch.randn(*read(floats)[name].shape) * 0.02}, {})
    assert diagnose(str(sound), str(other)).verdict != "ok"


@pytest.mark.parametrize("layout", ["fp8", "int8", "gptq", "awq", "packed", "nvfp4"])
def test_scales_of_another_weight_are_found_by_the_reference(layout: str, tmp_path: Path) -> None:
    w = made.trained(96, 128, seed=3)
    tensors, _ = made.made(layout, w)
    others, _ = made.made(layout, made.trained(96, 128, seed=4) * 2)
    role = next(n for n in tensors if n.endswith(("scales", "scale", "scale_inv")))
    config = {"quantization_config": made.CONFIGS.get(layout, {})}
    path = write_hf(tmp_path / "mixed", tensors | {role: others[role]}, config)
    floats = write_hf(tmp_path / "floats", {"m.weight": w}, {})
    found = diagnose(str(path), str(floats))
    assert found.verdict == "findings" and found.causes == ["Q02"]


def test_codes_that_leave_their_range_empty_are_a_warning(tmp_path: Path) -> None:
    tensors, _ = made.fp8(made.trained(96, 128))
    tensors["m.weight"] = (tensors["m.weight"].float() / 100).to(torch.float8_e4m3fn)
    found = diagnose(str(write_hf(tmp_path, tensors, {"quantization_config": made.CONFIGS["fp8"]})))
    assert [(f.code, f.severity) for f in found.findings if f.code == "Q07"] == [("Q07", "warning")]


# -- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "role", "code"),
    [
        ("mxfp4", "_scales", "Q01"),
        ("nvfp4", "weight_global_scale", "Q01"),
        ("gptq", "qzeros", "Q01"),
        ("gptq", "scales", "Q01"),
        ("awq", "qzeros", "Q01"),
        ("packed", "weight_scale", "Q01"),
        ("packed", "weight_shape", "Q01"),
    ],
)
def test_a_missing_part_is_said_and_refused(layout: str, role: str, code: str, tmp_path: Path) -> None:
    path, _, _ = folder(tmp_path / "q", layout, None)
    tensors = {n: t for n, t in load_file(path / "model.safetensors").items() if not n.endswith(role)}
    save_file(tensors, path / "model.safetensors")
    assert [p.code for w in stored.find_quantized(read(path)).values() for p in w.problems] == [code]
    with refused(code):
        make_plan([read(path)], "hf", dtype="BF16")


@pytest.mark.parametrize("layout", ["mxfp4", "nvfp4", "gptq", "awq", "packed-zeros", "fp8"])
def test_parts_of_another_shape_are_malformed(layout: str, tmp_path: Path) -> None:
    path, _, _ = folder(tmp_path / "q", layout, None)
    whole = load_file(path / "model.safetensors")
    for name in (n for n in whole if not n.endswith(("_blocks", "m.weight", "global_scale"))):
        save_file(whole | {name: whole[name][:-1].contiguous()}, path / "model.safetensors")
        assert [p for w in stored.find_quantized(read(path)).values() for p in w.problems], name


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 12, 16, 32, 64, 96]), max_size=4).map(tuple)
DTYPES = st.sampled_from(["int32", "uint8", "int8", "float16", "float32", "float8_e4m3fn", "int64"])
PARTS = (
    "qweight qzeros scales g_idx weight_packed weight_scale weight_shape weight_zero_point weight_g_idx weight "
    "weight_scale_inv weight_scale_2 weight_global_scale"
).split()


@given(
    parts=st.dictionaries(
        st.sampled_from([f"m.{p}" for p in PARTS] + ["m.a_blocks", "m.a_scales"]),
        st.tuples(SHAPES, DTYPES, st.integers(0, 255)),
        min_size=1,
        max_size=6,
    ),
    method=st.sampled_from([None, "gptq", "awq", "fp8", "compressed-tensors", 7]),
    bits=st.sampled_from([None, 0, 4, 9, "4", -1]),
)
@settings(max_examples=150, deadline=None)
def test_no_shapes_and_no_config_can_break_the_reader(
    parts: dict[str, tuple[tuple[int, ...], str, int]],
    method: Any,
    bits: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tensors = {
        n: torch.full((int(np.prod(shape)),), fill, dtype=torch.uint8).to(getattr(torch, dtype)).reshape(shape)
        for n, (shape, dtype, fill) in parts.items()
    }
    config = {"quantization_config": {"quant_method": method, "bits": bits, "weight_block_size": [bits, 0]}}
    view = read(write_hf(tmp_path_factory.mktemp("odd"), tensors, config))
    for name, weight in stored.find_quantized(view).items():
        if weight.problems:
            with pytest.raises(TensorkeepError):
                stored.dequantize(view, name)
        else:
            assert stored.dequantize(view, name).shape == weight.shape
    list(q07_codes_noise.check(Case("x", view)))


def test_orders_of_other_kernels_and_unknown_layouts_are_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = made.awq(None)
    path = write_hf(tmp_path / "gemv", tensors, {"quantization_config": {"quant_method": "awq", "version": "gemv"}})
    with refused("Q06", "gemv"):
        make_plan([read(path)], "hf", dtype="BF16")
    codes = {"m.codes": torch.zeros(8, 4, 1, dtype=torch.int16), "m.codebooks": torch.zeros(1, 256, 1, 8)}
    path = write_hf(tmp_path / "aqlm", codes, {"quantization_config": {"quant_method": "aqlm"}})
    with refused(None, "aqlm", "not read here"):
        make_plan([read(path)], "hf", dtype="BF16")
    assert all(s.actions == ("keep",) for s in make_plan([read(path)], "hf").steps)


def test_scales_of_activations_go_with_the_codes(tmp_path: Path) -> None:
    tensors, values = made.fp8(None)
    more = {"m.input_scale": torch.ones(1), "n.weight": torch.ones(3, 3), "n.input_scale": torch.ones(1)}
    to(write_hf(tmp_path / "q", tensors | more, {}), tmp_path / "out", "hf", dtype="F32")
    found = load_file(tmp_path / "out/model.safetensors")
    assert set(found) == {"m.weight", "n.weight", "n.input_scale"} and torch.equal(found["m.weight"], values)
