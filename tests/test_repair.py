"""Repair restores what was moved bit for bit, refuses or openly takes what is lost, and does nothing by halves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tensorkeep.cli import main
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.diagnosis.repairs import repair
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tests.fault_kinds.writing import write
from tests.faults import make
from tests.specimens import specimen

# permutations, names, ties and prefixes, which must come back as the original bit for bit
EXACT = (
    "rope_q_and_k rope_q_only rope_wrong_direction layers_swapped layers_reversed layers_lexicographic "
    "gate_up_swapped k_v_swapped norms_swapped vocabulary_shifted vocabulary_permuted shard_order_of_rows "
    "shard_order_of_columns heads_rolled transposed_square transposed_oblong wrapper_in_front nested_root "
    "unexpected_tensor vocabulary_padded head_overwritten bit_flip_exponent nan norm_ones reinitialised_tensor "
    "scaled_by_power_of_two missing_tensor"
).split()


def equal(a: Path, b: Path) -> bool:
    return all(d.status == "equal" for d in compare(read(a), read(b)))


@pytest.mark.parametrize("model", ["llama_mha", "olmo2"])
@pytest.mark.parametrize("kind", EXACT)
def test_repair_gives_the_original_bit_for_bit(kind: str, model: str, tmp_path: Path) -> None:
    fault = make(kind, model, 7, tmp_path)
    if fault is None:
        pytest.skip(f"{model} cannot have {kind}")
    out = tmp_path / ("mended.pth" if fault.path.is_file() else "mended")
    done = repair(str(fault.path), str(out), str(fault.reference), fault.target)  # type: ignore[arg-type]
    assert done.after.verdict == "ok", [(f.code, f.message) for f in done.after.findings]
    assert equal(out, fault.reference)


@pytest.mark.parametrize("kind", ["truncated", "file_missing", "no_name_in_common", "malicious_metadata"])
def test_what_cannot_be_repaired_is_refused_and_says_what_it_needs(kind: str, tmp_path: Path) -> None:
    fault = make(kind, "llama_mha", 1, tmp_path)
    assert fault is not None
    out = tmp_path / "mended"
    with pytest.raises(TensorkeepError) as refused:
        repair(str(fault.path), str(out), str(fault.reference))
    assert refused.value.code and refused.value.hint and not out.exists()


def test_lost_values_of_a_trained_checkpoint_are_not_taken_from_its_base(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    rng = np.random.default_rng(0)
    lost = "model.layers.1.self_attn.q_proj.weight"
    state = {
        n: (t.astype(np.float32) * (1 + 0.02 * rng.standard_normal(t.shape))).astype(t.dtype)
        for n, t in m.tensors.items()
    }
    state[lost] = (0.02 * rng.standard_normal(state[lost].shape)).astype(state[lost].dtype)
    path, base = write("hf", state, tmp_path / "trained", m.config), write("hf", m.tensors, tmp_path / "base", m.config)
    with pytest.raises(TensorkeepError, match="lost") as refused:
        repair(str(path), str(tmp_path / "out"), str(base))
    assert refused.value.code == "V03" and not (tmp_path / "out").exists()


def test_a_trained_checkpoint_keeps_its_training(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    rng = np.random.default_rng(0)
    state = {
        n: (t.astype(np.float32) * (1 + 0.02 * rng.standard_normal(t.shape))).astype(t.dtype)
        for n, t in m.tensors.items()
    }
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    good = write("hf", state, tmp_path / "trained", m.config)
    path = write("hf", {**state, gate: state[up], up: state[gate]}, tmp_path / "swapped", m.config)
    base = write("hf", m.tensors, tmp_path / "base", m.config)
    done = repair(str(path), str(tmp_path / "out"), str(base))
    assert done.before.causes == ["O03"] and not done.taken
    assert equal(tmp_path / "out", good)


def test_a_sound_checkpoint_has_nothing_to_repair(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    base = write("hf", m.tensors, tmp_path / "base", m.config)
    with pytest.raises(TensorkeepError, match="nothing to repair"):
        repair(str(base), str(tmp_path / "out"), str(base))


def test_the_config_is_taken_from_the_reference(tmp_path: Path) -> None:
    m = specimen("llama_mha")
    base = write("hf", m.tensors, tmp_path / "base", m.config)
    path = write("hf", m.tensors, tmp_path / "odd", {**m.config, "rms_norm_eps": 1e-2})
    done = repair(str(path), str(tmp_path / "out"), str(base))
    assert done.before.causes == ["C01"] and done.after.verdict == "ok"
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = make("rope_q_only", "llama_mha", 2, tmp_path)
    assert fault is not None
    out = tmp_path / ("out.pth" if fault.path.is_file() else "out")
    assert main(["repair", str(fault.path), str(out), "--reference", str(fault.reference)]) == 0
    assert "O01" in capsys.readouterr().out
    assert main(["repair", str(fault.path), str(out), "--reference", str(fault.reference)]) == 2  # it is there already
