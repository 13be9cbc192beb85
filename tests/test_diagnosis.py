"""Diagnosis names every fault of the fixtures, reports causes once, and raises nothing of sound checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.cli import main
from tensorkeep.diagnosis.checks import CODES, explain, title
from tensorkeep.diagnosis.diagnosis import diagnose
from tensorkeep.errors import TensorkeepError
from tests.fault_kinds.change import KINDS
from tests.fault_kinds.writing import write
from tests.faults import judge, make
from tests.sound import VARIANTS, every
from tests.specimens import specimen

OPEN = Path(__file__).parents[2] / "shared/fixtures/conversion/open"
REAL = Path(__file__).parents[2] / "shared/fixtures/real"
SICK = OPEN / "sick_olmo2_bf16"
# fault of answers.json -> code (README of the fixtures)
NAMED = {
    "none": None,
    "missing_key": "K01",
    "rope_layout_interleaved": "O01",
    "layer_order": "O02",
    "reinitialised_tensor": "V03",
    "prefix": "K03",
    "norm_reset_to_ones": "V04",
    "precision_loss_fp8_e4m3": "V02",
    "transposed": "S03",
    "swapped_gate_up": "O03",
    "nan": "V01",
    "unexpected_key": "K02",
    "vocab_padded_512_to_640": "S02",
    "truncated_data_file": "F02",
    "bit_flip": "V07",
    "metadata_without_storage_entry": "F07",
    "lm_head_overwritten_by_embedding": "T02",
    "malicious_metadata_pickle": "F04",
    "path_traversal_in_metadata": "F06",
    "missing_data_file": "F05",
    "small_value_drift": "V06",
}
FEW = (
    "rope_q_only layers_reversed gate_up_swapped reinitialised_tensor norm_ones vocabulary_shifted nested_root nan"
).split()


@pytest.mark.skipif(not SICK.exists(), reason="the conversion fixtures are not beside the checkout")
@pytest.mark.parametrize("number", range(23))
def test_sick_case_is_named(number: int) -> None:
    answers = json.loads((SICK / "answers.json").read_text())
    case = f"c{number:02}"
    answer = answers["cases"][case]
    fault = answer["fault"].split()[0].split(":")[0]
    code = "K04" if "nested" in answer["fault"] else NAMED[fault]
    found = diagnose(str(SICK / case / "step-0"), str(SICK / answers["reference_hf"]))
    errors = {f.code for f in found.findings if f.severity == "error"}
    explained = {c for f in found.findings if f.code in found.causes for c in f.explains}
    if code is None:
        assert found.verdict == "ok" and not errors
        return
    assert code in found.causes
    assert errors - {code} <= explained
    wanted = answer["tensors"]
    if wanted and not wanted[0].startswith("layers"):
        assert {n for f in found.findings if f.code == code for n in f.tensors} == set(wanted)


@pytest.mark.parametrize("model", ["llama_tied", "olmo2"])
@pytest.mark.parametrize("kind", FEW)
def test_a_made_fault_is_named(kind: str, model: str, tmp_path: Path) -> None:
    assert kind in KINDS
    fault = make(kind, model, 5, tmp_path)
    if fault is None:
        pytest.skip(f"{model} cannot have {kind}")
    document = diagnose(str(fault.path), str(fault.reference), fault.target).to_json()  # type: ignore[arg-type]
    verdict, why = judge(fault, document)
    assert verdict == "named", why
    json.dumps(document, allow_nan=False)


def test_sound_checkpoints_raise_no_error(tmp_path: Path) -> None:
    names = (
        "identical dcp_flat fine_tuned bf16_copy fp32_copy adapter_merged without_reference torchtitan_names"
    ).split()
    assert set(names) <= VARIANTS.keys()
    for sound in every("llama_tied", tmp_path, 3, names):
        found = diagnose(str(sound.path), str(sound.reference) if sound.reference else None, sound.target)  # type: ignore[arg-type]
        assert found.verdict == "ok", (sound, [(f.code, f.message) for f in found.findings])


@pytest.mark.skipif(not REAL.exists(), reason="the small real models are not beside the checkout")
def test_a_real_model_is_sound_without_a_reference() -> None:
    found = diagnose(str(REAL / "stories260K/hf"))
    assert found.verdict == "ok" and not found.causes


def sick(tmp_path: Path, **tensors: Any) -> tuple[Path, Path]:
    """Write a llama and a copy in which the given tensors are replaced; return the copy and the original."""
    m = specimen("llama_mha")
    reference = write("hf", m.tensors, tmp_path / "reference", m.config)
    return write("hf", {**m.tensors, **tensors}, tmp_path / "sick", m.config), reference


def test_two_faults_are_two_causes_and_each_tensor_belongs_to_one(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    norm, down = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
    broken = m.tensors[down].copy()
    broken.reshape(-1)[5] = np.nan
    path, reference = sick(tmp_path, **{norm: np.ones_like(m.tensors[norm]), down: broken})
    found = diagnose(str(path), str(reference))
    assert found.causes == ["V04", "V01"]
    assert [list(f.tensors) for f in found.findings if f.severity == "error"] == [[norm], [down]]


def test_evidence_is_in_numbers(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    name = "model.layers.1.self_attn.v_proj.weight"
    path, reference = sick(tmp_path, **{name: (m.tensors[name].astype(np.float32) * 1.5).astype(m.tensors[name].dtype)})
    (finding,) = [f for f in diagnose(str(path), str(reference)).findings if f.code == "V06"]
    assert finding.evidence["tensors"][name]["fit"] == "scale"
    assert finding.evidence["tensors"][name]["by"] == pytest.approx(1.5, abs=0.01)


def test_a_dead_path_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(TensorkeepError):
        diagnose(str(tmp_path / "nothing"), None)


def test_an_unknown_architecture_without_a_reference_is_inconclusive(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    path = write("hf", m.tensors, tmp_path / "odd", {**m.config, "model_type": "nobody_knows"})
    found = diagnose(str(path))
    assert found.verdict == "inconclusive" and found.exit_code == 3


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_explained(code: str) -> None:
    page = explain(code)
    assert page.startswith(f"{code} ") and len(page.splitlines()) > 5
    assert title(code)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = specimen("llama_mha")
    norm = "model.layers.1.input_layernorm.weight"
    path, reference = sick(tmp_path, **{norm: np.ones_like(m.tensors[norm])})
    assert main(["diagnose", str(path), "--reference", str(reference), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1 and document["verdict"] == "findings" and document["causes"] == ["V04"]
    fields = "code severity tensors count message evidence explains fix"
    assert set(document["findings"][0]) == set(fields.split())
    assert main(["diagnose", str(path), "--reference", str(reference)]) == 1
    printed = capsys.readouterr().out
    assert printed.lstrip().startswith("parameters in the reference")
    assert "cause: V04" in printed and "fix: tensorkeep repair" in printed
    assert main(["diagnose", str(reference), "--reference", str(reference)]) == 0
    assert main(["explain", "v04"]) == 0
    assert main(["explain", "Z99"]) == 2


# -- what is no fault -------------------------------------------------------------------------------------------------


def test_a_head_in_another_precision_is_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    m = specimen("llama_tied")
    embedding = m.tensors["model.embed_tokens.weight"]
    for dtype in (np.float32, embedding.dtype):
        wide = (embedding.astype(np.float32) * np.float32(1.001)).astype(dtype)
        state = {**m.tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": wide}
        state["model.embed_tokens.weight"] = wide.astype(embedding.dtype)
        path = write("hf", state, tmp_path / np.dtype(dtype).name, m.config)
        for target in (None, "torchtitan"):
            codes = {f.code for f in diagnose(str(path), None, target).findings}  # type: ignore[arg-type]
            assert not codes & {"T01", "K07"}, (dtype, target)


def test_torchtitans_loader_is_judged_only_where_the_family_is_known(tmp_path: Path) -> None:
    m = specimen("llama_bias")
    for kind, named in (("llama", True), ("nobody_knows", False)):
        path = write("hf", m.tensors, tmp_path / kind, {**m.config, "model_type": kind})
        found = {f.code for f in diagnose(str(path), None, "torchtitan").findings}
        assert ("K07" in found) is named


def test_the_padding_tokens_row_may_be_zero_and_no_other(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    embedding = m.tensors["model.embed_tokens.weight"].copy()
    embedding[7] = 0
    words = {"model": {"vocab": {f"w{i}": i for i in range(len(embedding))}}, "added_tokens": []}
    for padding, named in ((7, False), (8, True), ([7], True)):
        place = tmp_path / str(padding)
        state = {**m.tensors, "model.embed_tokens.weight": embedding}
        files = {"tokenizer.json": json.dumps(words).encode()}
        path = write("hf", state, place, {**m.config, "pad_token_id": padding}, files)
        assert ("C02" in {f.code for f in diagnose(str(path)).findings}) is named


def test_packed_weights_that_are_not_decoded_here_are_undecided(tmp_path: Path) -> None:
    """Random codes under names that nothing here reads: nothing was found out about them, so nothing is ok."""
    m, rng = specimen("llama_mha"), np.random.default_rng(0)
    state = dict(m.tensors)
    for name in [n for n in state if n.endswith("_proj.weight")]:
        rows, columns = state.pop(name).shape
        stem = name.removesuffix(".weight")
        state[f"{stem}.weight_blocks"] = rng.integers(0, 256, (rows, columns // 2), np.int64).astype(np.uint8)
        state[f"{stem}.weight_scales"] = np.ones((1, rows), np.float16)
    packed = write("hf", state, tmp_path / "packed", m.config)
    base = write("hf", m.tensors, tmp_path / "base", m.config)
    for reference in (None, base):
        found = diagnose(str(packed), str(reference) if reference else None)
        assert found.verdict == "inconclusive", [(f.code, f.message) for f in found.findings]
        assert any(f.code == "Q01" and f.evidence.get("inconclusive") for f in found.findings)
    assert diagnose(str(packed), str(packed)).verdict == "ok"
