"""Checks of quantized weights name each fault by its code and report nothing on sound files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorkeep.diagnosis.checks import CODES, explain
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.diagnosis.evidence.quantized_digests import RECORD, digests
from tensorkeep.formats.view import read
from tensorkeep.quantization import stored as quantized
from tests import quant_files as files
from tests.quant_files import MINE, QLORA, Tensors, findings, gaussian, matrices, model, needs_qlora, quantize, said

FAST = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("code", MINE)
def test_every_code_has_a_page(code: str) -> None:
    page = explain(code)
    assert page.startswith(f"{code} ") and ":" in page.splitlines()[0]
    assert len(page.splitlines()) > 8
    assert code == importlib.import_module(CODES[code]).CODE


@needs_qlora
@pytest.mark.parametrize("kind", ["nf4_dq", "nf4", "fp4_dq", "fp4", "nf4_dq_bf16store", "int8"])
def test_sound_fixtures_raise_nothing_with_their_base_and_stay_open_without(kind: str) -> None:
    found, undecided = findings(QLORA / f"quant_{kind}", QLORA / "base")
    assert (said(found), said(found, "warning"), undecided) == (set(), set(), set())
    found, undecided = findings(QLORA / f"quant_{kind}")
    assert (said(found), said(found, "warning"), undecided) == (set(), set(), {"Q02", "Q03"})


@needs_qlora
@pytest.mark.parametrize(
    ("name", "code", "alone"),
    [
        ("nf4_dq_packed_of_A_absmax_of_B", "Q02", None),
        ("nf4_dq_ema0.9999_of_packed_bytes", "Q03", None),
        ("nf4_dq_quant_state_filtered_out", "Q01", "Q01"),
        ("nf4_absmax_transposed_by_cpu_eval", "Q06", "Q06"),
    ],
)
def test_damaged_fixtures_are_named(name: str, code: str, alone: str | None) -> None:
    found, undecided = findings(QLORA / f"damaged/{name}.safetensors", QLORA / "base")
    assert (said(found), undecided) == ({code}, set())
    assert sum(len(f.tensors) for f in found if f.code == code) == 14
    found, undecided = findings(QLORA / f"damaged/{name}.safetensors")
    assert said(found) == ({alone} if alone else set())
    assert undecided == (set() if alone else {"Q02", "Q03"})


@needs_qlora
def test_the_whole_diagnosis_agrees() -> None:
    damaged = QLORA / "damaged/nf4_dq_packed_of_A_absmax_of_B.safetensors"
    assert diagnose(str(damaged), str(QLORA / "base")).causes == ["Q02"]
    assert diagnose(str(damaged)).verdict == "inconclusive"
    assert diagnose(str(QLORA / "quant_nf4_dq"), str(QLORA / "base")).verdict == "ok"
    assert diagnose(str(QLORA / "quant_nf4_dq")).verdict == "inconclusive"
    assert diagnose(str(QLORA / "damaged/nf4_dq_quant_state_filtered_out.safetensors"), str(QLORA / "base")).causes == [
        "Q01"
    ]


@FAST
@given(
    st.sampled_from(["nf4", "fp4", "int8"]),
    st.booleans(),
    st.sampled_from([64, 96, 100]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 50),
)
def test_sound_files_of_any_shape_and_reference_dtype_raise_no_error(
    tmp_path: Path, kind: str, nested: bool, columns: int, dtype: str, seed: int
) -> None:
    tensors = model(seed, 1, columns)
    base = files.write(tmp_path / "base", {n: t.astype(getattr(ml_dtypes, dtype, dtype)) for n, t in tensors.items()})
    options = {} if kind == "int8" else {"nested": nested}
    found, undecided = findings(files.write(tmp_path / "q", quantize(tensors, kind, **options)), base)
    assert (said(found), undecided) == (set(), set()), [f.message for f in found]
    assert said(found, "warning") <= {"Q05"}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("part", ["state", "codes"])
def test_state_or_codes_of_another_weight(tmp_path: Path, kind: str, part: str) -> None:
    tensors, other = model(1), model(2)
    mine, theirs = quantize(tensors, kind), quantize(other, kind)
    name = matrices(tensors)[2]
    taken = [
        n
        for n in mine
        if n.startswith(name.removesuffix("weight"))
        and (n == name) == (part == "codes")
        and not n.endswith(("quant_map", f"__{kind}"))
    ]
    mixed = {**mine, **{n: theirs[n] for n in taken}}
    found, undecided = findings(files.write(tmp_path / "q", mixed), files.write(tmp_path / "base", tensors), "Q")
    assert [(f.code, list(f.tensors)) for f in found if f.severity == "error"] == [("Q02", [name])]
    assert undecided == set()


@pytest.mark.parametrize("storage", ["uint8", "float32"])
@pytest.mark.parametrize("decay", [0.9, 0.9995, 0.9999])
def test_averaged_four_bit_codes(tmp_path: Path, decay: float, storage: str) -> None:
    tensors = model(3)
    mine = quantize(tensors, storage=storage)
    for name in matrices(tensors):
        packed = mine[name].reshape(-1).view(np.uint8)
        made = files.averaged_bytes(packed, decay, 50)
        assert (made != packed).any()
        mine[name] = made.view(mine[name].dtype).reshape(-1, 1)
    found, undecided = findings(files.write(tmp_path / "q", mine), files.write(tmp_path / "base", tensors), "Q")
    assert [(f.code, sorted(f.tensors)) for f in found if f.severity == "error"] == [("Q03", sorted(matrices(tensors)))]
    assert undecided == set()


def test_averaged_int8_codes(tmp_path: Path) -> None:
    tensors = model(4)
    mine = quantize(tensors, "int8")
    for name in matrices(tensors):
        mine[name] = files.averaged_bytes(mine[name], 0.9999, 20)
    found, _ = findings(files.write(tmp_path / "q", mine), files.write(tmp_path / "base", tensors), "Q")
    assert said(found) == {"Q03"}


def test_digests_decide_without_a_reference(tmp_path: Path) -> None:
    tensors, other = model(5), quantize(model(6))
    mine = quantize(tensors)
    view = read(files.write(tmp_path / "sound", mine))
    metadata = {
        "format": "pt",
        RECORD: json.dumps({n: digests(view, w) for n, w in quantized.find_quantized(view).items()}),
    }
    name = matrices(tensors)[1]
    cases: dict[str, tuple[Tensors, set[str]]] = {
        "sound": (mine, set()),
        "state": ({**mine, f"{name}.absmax": other[f"{name}.absmax"]}, {"Q02"}),
        "codes": ({**mine, name: other[name]}, {"Q03"}),
    }
    for word, (stored, wanted) in cases.items():
        found, undecided = findings(files.write(tmp_path / f"with-{word}", stored, metadata=metadata), None, "Q")
        assert (said(found), undecided) == (wanted, set()), word


def test_a_reference_that_was_never_the_source_judges_nothing(tmp_path: Path) -> None:
    found, undecided = findings(
        files.write(tmp_path / "q", quantize(model(7))), files.write(tmp_path / "base", model(8)), "Q"
    )
    assert (said(found), undecided) == (set(), {"Q02"})


def test_a_merge_that_was_quantized_again_is_no_error(tmp_path: Path) -> None:
    tensors = model(9)
    first = quantize(tensors)
    again = {}
    for name in matrices(tensors):
        view = read(files.write(tmp_path / "once", first))
        again[name] = quantized.dequantize(view, name) + gaussian(tensors[name].shape, 11, 0.0003)
    stored = files.write(tmp_path / "twice", quantize({**tensors, **again}))
    for base in (files.write(tmp_path / "base", tensors), str(tmp_path / "once")):
        found, _ = findings(stored, base, "Q")
        assert said(found) == set()


def test_quantized_against_the_same_weights_quantized_doubly(tmp_path: Path) -> None:
    tensors = model(10)
    one, two = (files.write(tmp_path / str(nested), quantize(tensors, nested=nested)) for nested in (False, True))
    for checkpoint, reference in ((one, two), (two, one), (one, one)):
        found, undecided = findings(checkpoint, reference, "Q")
        assert (said(found), undecided) == (set(), set())


def test_float_storage_without_state_is_found_by_the_reference(tmp_path: Path) -> None:
    tensors = model(11)
    bare = {n: t for n, t in quantize(tensors, storage="bfloat16").items() if n in tensors}
    found, _ = findings(files.write(tmp_path / "q", bare), files.write(tmp_path / "base", tensors), "Q")
    assert said(found) == {"Q01"}


def test_fp8_without_scales_is_missing_them_only_where_it_had_some(tmp_path: Path) -> None:
    weight = gaussian((16, 16), 1)
    cast = files.write(tmp_path / "cast", {"a.weight": weight.astype(ml_dtypes.float8_e4m3fn)})
    scaled = files.write(
        tmp_path / "scaled", {"a.weight": (weight * 448 / np.abs(weight).max()).astype(ml_dtypes.float8_e4m3fn)}
    )
    assert said(findings(cast, None, "Q")[0]) == set()
    assert said(findings(scaled, None, "Q")[0]) == {"Q01"}


def test_fp8_scales_of_another_weight(tmp_path: Path) -> None:
    tensors = model(12)
    stored: Tensors = {"model.norm.weight": tensors["model.norm.weight"]}
    for name in matrices(tensors):
        scale = np.abs(tensors[name]).max(1, keepdims=True) / 448
        stored[name] = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
        stored[name.removesuffix("weight") + "weight_scale"] = scale
    base = files.write(tmp_path / "base", tensors)
    assert said(findings(files.write(tmp_path / "sound", stored), base, "Q")[0]) == set()
    first = matrices(tensors)[0].removesuffix("weight") + "weight_scale"
    stored[first] = stored[first][::-1].copy()
    assert said(findings(files.write(tmp_path / "mixed", stored), base, "Q")[0]) == {"Q02"}


@pytest.mark.parametrize(("bound", "wanted"), [(1.0, {"Q04"}), (0.0, {"Q04"}), (0.7, set())])
@pytest.mark.parametrize("nested", [False, True])
def test_frozen_random_projections_are_a_warning(tmp_path: Path, bound: float, wanted: set[str], nested: bool) -> None:
    weight = (np.random.default_rng(1).uniform(-1, 1, (64, 384)) * bound / np.sqrt(384)).astype(np.float32)
    tensors = {**model(13), "blocks.0.adapter.down_proj.weight": weight}
    found, _ = findings(files.write(tmp_path, quantize(tensors, nested=nested)), None, "Q")
    warned = [f for f in found if f.code == "Q04"]
    assert {f.code for f in warned} == wanted and said(found) == set()
    assert not warned or list(warned[0].tensors) == ["blocks.0.adapter.down_proj.weight"]


@pytest.mark.parametrize(("columns", "wanted"), [(96, {"Q05"}), (176, {"Q05"}), (128, set()), (100, set())])
def test_rows_that_blocks_straddle(tmp_path: Path, columns: int, wanted: set[str]) -> None:
    found, _ = findings(files.write(tmp_path, quantize({"m.weight": gaussian((8, columns), 1)})), None, "Q")
    assert (said(found, "warning"), said(found)) == (wanted, set())


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_that_cannot_be(tmp_path: Path, value: float) -> None:
    stored = quantize(model(14))
    name = matrices(model(14))[0]
    stored[f"{name}.absmax"] = np.where(
        np.arange(stored[f"{name}.absmax"].size) == 3, np.float32(value), stored[f"{name}.absmax"]
    )
    assert "Q06" in said(findings(files.write(tmp_path, stored), None, "Q")[0])


def test_the_map_of_the_other_kind_is_malformed(tmp_path: Path) -> None:
    stored = quantize({"m.weight": gaussian((8, 64), 1)})
    stored["m.weight.quant_map"] = files.fp4_table()
    assert said(findings(files.write(tmp_path, stored), None, "Q")[0]) == {"Q06"}
