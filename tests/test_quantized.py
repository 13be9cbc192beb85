"""Quantized weights: what belongs together, values bit for bit, malformed states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.conversion import naming
from tensorkeep.diagnosis import inspection
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import stored as quantized
from tests import quant_files as files

QLORA = Path(__file__).parents[2] / "shared/fixtures/qlora/open"
needs_fixtures = pytest.mark.skipif(not QLORA.is_dir(), reason="the shared qlora fixtures are not here")
W = "model.layers.0.mlp.up_proj.weight"
FAST = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def same_bits(a: Any, b: Any) -> bool:
    return (
        a.shape == b.shape and a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))
    )


@pytest.mark.parametrize(("kind", "table"), [("nf4", files.nf4_table()), ("fp4", files.fp4_table())])
def test_tables_are_what_their_papers_derive(kind: str, table: Any) -> None:
    assert np.allclose(quant_codes.TABLES[kind], table, atol=2e-7)


@FAST
@given(SHAPES, st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128, 4096]), st.booleans(), st.integers(0, 99))
def test_four_bits_decode_as_one_element_after_another(
    tmp_path: Path, shape: tuple[int, int], kind: str, block: int, nested: bool, seed: int
) -> None:
    parts = files.four_bit(gaussian(shape, seed), kind, block, nested, nested_block=4)
    view = read(files.write(tmp_path, files.named(W, parts)))
    weight = quantized.find_quantized(view)[W]
    assert (weight.kind, weight.shape, weight.problems) == (kind, shape, ())
    assert same_bits(quantized.dequantize(view, W), files.decoded(parts))


@FAST
@given(SHAPES, st.sampled_from(["nf4", "fp4"]), st.integers(0, 99))
def test_dequantized_values_are_within_half_a_gap_of_the_original(
    tmp_path: Path, shape: tuple[int, int], kind: str, seed: int
) -> None:
    weight = gaussian(shape, seed)
    view = read(files.write(tmp_path, files.named(W, files.four_bit(weight, kind))))
    peaks = np.repeat(quant_codes.block_maxima(weight, 64), 64)[: weight.size].reshape(shape)
    gap = np.diff(np.sort(quant_codes.TABLES[kind])).max() / 2
    assert (np.abs(quantized.dequantize(view, W) - weight) <= gap * peaks * (1 + 1e-5)).all()


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_storage_dtype_is_reinterpreted_and_never_converted(tmp_path: Path, storage: str) -> None:
    weight = gaussian((6, 96))
    plain = read(files.write(tmp_path / "a", files.named(W, files.four_bit(weight))))
    typed = read(files.write(tmp_path / "b", files.named(W, files.four_bit(weight, storage=storage))))
    assert typed[W].dtype != "U8"
    assert same_bits(quantized.dequantize(typed, W), quantized.dequantize(plain, W))


def test_pieces_do_not_change_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian((37, 50))
    codes, scb = files.int8(weight)
    tensors = {**files.named(W, files.four_bit(weight, nested=True)), "b.weight": codes, "b.SCB": scb}
    view = read(files.write(tmp_path, tensors))
    whole = [quantized.dequantize(view, n) for n in (W, "b.weight")]
    monkeypatch.setattr(quant_codes, "ELEMENTS_AT_ONCE", 200)
    assert all(same_bits(quantized.dequantize(view, n), w) for n, w in zip((W, "b.weight"), whole))


def test_int8_multiplies_by_one_127th(tmp_path: Path) -> None:
    codes, scb = files.int8(gaussian((5, 33)))
    view = read(files.write(tmp_path, {"m.weight": codes, "m.SCB": scb, "m.weight_format": np.array(0, np.uint8)}))
    assert quantized.find_quantized(view)["m.weight"].kind == "int8"
    assert same_bits(
        quantized.dequantize(view, "m.weight"), codes.astype(np.float32) * scb[:, None] * np.float32(1 / 127)
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_scale", ()),
        ("weight_scale", (1,)),
        ("weight_scale", (200, 1)),
        ("weight_scale", (200,)),
        ("weight_scale", (200, 3)),
        ("weight_scale_inv", (2, 3)),
    ],
)
def test_fp8_scales_by_tensor_row_group_and_block(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    codes = gaussian((200, 300), 1).astype(ml_dtypes.float8_e4m3fn)
    scales = np.abs(gaussian(shape or (1,), 2)).reshape(shape) + np.float32(1)
    view = read(files.write(tmp_path, {"m.weight": codes, f"m.{name}": scales}))
    full = scales.reshape(1, 1) if scales.size == 1 else scales.reshape(200, 1) if scales.size == 200 else scales
    across = 100 if shape == (200, 3) else 128
    if full.shape[1] > 1:
        full = np.repeat(full, across, 1)[:, :300]
    if full.shape[0] == 2:
        full = np.repeat(full, 128, 0)[:200]
    assert same_bits(quantized.dequantize(view, "m.weight"), codes.astype(np.float32) * full)


def test_torchao_names_and_zero_points(tmp_path: Path) -> None:
    codes, scale = np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.array([[0.5], [1.0], [2.0]], np.float32)
    zero = np.array([[1], [0], [-1]], np.int8)
    view = read(
        files.write(tmp_path, {"m._weight_qdata": codes, "m._weight_scale": scale, "m._weight_zero_point": zero})
    )
    (weight,) = quantized.find_quantized(view).values()
    assert (weight.stands_for, weight.problems) == ("m.weight", ())
    assert same_bits(quantized.dequantize(view, "m._weight_qdata"), (codes.astype(np.float32) - zero) * scale)


def test_plain_tensors_are_not_taken_for_quantized_ones(tmp_path: Path) -> None:
    tensors = {
        "a.weight": gaussian((4, 4)),
        "b.weight": gaussian((4, 4)).astype(ml_dtypes.float8_e4m3fn),
        "bn.num_batches_tracked": np.array(3, np.int64),
        "mask": np.zeros((4, 1), np.uint8),
        "observer.absmax": np.ones(3, np.float32),
        "col.weight": gaussian((4, 1)),
    }
    assert quantized.find_quantized(read(files.write(tmp_path, tensors))) == {}


@pytest.mark.parametrize(
    ("drop", "code"),
    [
        ("absmax", "Q01"),
        ("quant_map", "Q01"),
        ("quant_state.bitsandbytes__nf4", "Q01"),
        ("nested_absmax", "Q01"),
        ("", "Q06"),
    ],
)
def test_a_missing_part_is_said_and_refused(tmp_path: Path, drop: str, code: str) -> None:
    parts = {k: v for k, v in files.four_bit(gaussian((4, 64)), nested=True).items() if k != drop}
    view = read(files.write(tmp_path, files.named(W, parts)))
    assert code in [p.code for p in quantized.find_quantized(view)[W].problems]
    with pytest.raises(TensorkeepError) as caught:
        quantized.dequantize(view, W)
    assert caught.value.code in ("Q01", "Q06")


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("absmax", np.ones((1, 4), np.float32)),
        ("absmax", np.ones(4, ml_dtypes.bfloat16)),
        ("absmax", np.ones(3, np.float32)),
        ("quant_map", np.ones(15, np.float32)),
        ("", np.zeros((4, 32), np.uint8)),
        ("", np.zeros((129, 1), np.uint8)),
    ],
)
def test_a_part_that_contradicts_the_description_is_malformed(tmp_path: Path, role: str, value: Any) -> None:
    view = read(files.write(tmp_path, files.named(W, {**files.four_bit(gaussian((4, 64))), role: value})))
    assert {p.code for p in quantized.find_quantized(view)[W].problems} == {"Q06"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@FAST
@given(st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"]), JSON)
def test_no_state_can_break_the_reader(tmp_path: Path, key: str, value: Any) -> None:
    parts = files.four_bit(gaussian((4, 64)), nested=True)
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"])) | {key: value}
    parts["quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    view = read(files.write(tmp_path, files.named(W, parts)))
    weight = quantized.find_quantized(view)[W]
    if not weight.problems:
        assert quantized.dequantize(view, W).shape == tuple(state["shape"])
        return
    with pytest.raises(TensorkeepError):
        quantized.dequantize(view, W)


@FAST
@given(st.binary(max_size=200))
def test_no_bytes_in_place_of_the_state_can_break_the_reader(tmp_path: Path, data: bytes) -> None:
    parts = files.four_bit(gaussian((4, 64)))
    parts["quant_state.bitsandbytes__nf4"] = np.frombuffer(data, np.uint8)
    weight = quantized.find_quantized(read(files.write(tmp_path, files.named(W, parts))))[W]
    assert weight.problems


def test_inspect_counts_unpacked_weights_and_names_what_is_missing(tmp_path: Path) -> None:
    parts = files.four_bit(gaussian((6, 64)))
    view = read(
        files.write(
            tmp_path,
            {
                **files.named(W, parts),
                "model.norm.weight": gaussian((64,)),
                "model.layers.1.mlp.up_proj.weight": parts[""],
            },
        )
    )
    assert inspection.parameters(view, naming.identify(view)) == 6 * 64 + 64 + parts[""].size
    first, second = inspection.quantized(view)
    assert first == {"name": W, "kind": "nf4", "shape": [6, 64]}
    assert second["problems"] == ["Q01 packed codes without scales, map and state"]


@needs_fixtures
@pytest.mark.parametrize("kind", ["nf4_dq", "nf4", "fp4_dq", "fp4", "nf4_dq_bf16store", "int8"])
def test_fixtures_dequantize_bit_for_bit(kind: str) -> None:
    view, golden = read(QLORA / f"quant_{kind}"), read(QLORA / f"dequant_{kind}.safetensors")
    found = quantized.find_quantized(view)
    assert set(found) == set(golden)
    assert all(same_bits(quantized.dequantize(view, n, w), golden.array(n)) for n, w in found.items())
