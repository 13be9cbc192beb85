"""Repair restores what was moved bit for bit, refuses or openly takes what is lost, and does nothing by halves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorkeep.cli import main
from tensorkeep.diagnosis._keeping import mark
from tensorkeep.diagnosis.comparison import compare
from tensorkeep.diagnosis.repairs import Repaired, repair
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import read
from tests.fault_kinds.writing import write
from tests.faults import make
from tests.fine_tuned import Way, fine_tuned_copy
from tests.specimens import Specimen, State, specimen

# permutations, names, ties and prefixes, which must come back as the original bit for bit
EXACT = (
    "rope_q_and_k rope_q_only rope_wrong_direction layers_swapped layers_reversed layers_lexicographic "
    "gate_up_swapped k_v_swapped norms_swapped vocabulary_shifted vocabulary_permuted shard_order_of_rows "
    "shard_order_of_columns heads_rolled transposed_square transposed_oblong wrapper_in_front nested_root "
    "unexpected_tensor vocabulary_padded head_overwritten bit_flip_exponent nan norm_ones reinitialised_tensor "
    "scaled_by_power_of_two missing_tensor"
).split()

# kinds that destroy values, which only the reference has any more; and kinds in which values are left out
TAKES = "head_overwritten bit_flip_exponent nan norm_ones reinitialised_tensor missing_tensor".split()
LOSES = "unexpected_tensor vocabulary_padded".split()


def equal(a: Path, b: Path) -> bool:
    return all(d.status == "equal" for d in compare(read(a), read(b)))


@pytest.mark.parametrize("model", ["llama_mha", "olmo2"])
@pytest.mark.parametrize("kind", EXACT)
def test_repair_gives_the_original_bit_for_bit(kind: str, model: str, tmp_path: Path) -> None:
    fault = make(kind, model, 7, tmp_path)
    if fault is None:
        pytest.skip(f"{model} cannot have {kind}")
    out = tmp_path / ("mended.pth" if fault.path.is_file() else "mended")
    take = ["*"] if kind in TAKES else []
    done = repair(str(fault.path), str(out), str(fault.reference), fault.target, take=take, yes=kind in LOSES)  # type: ignore[arg-type]
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
    with pytest.raises(TensorkeepError, match=r"config\.json"):
        repair(str(path), str(tmp_path / "out"), str(base))
    done = repair(str(path), str(tmp_path / "out"), str(base), take=["config.json"])
    assert done.before.causes == ["C01"] and done.after.verdict == "ok"
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = make("rope_q_only", "llama_mha", 2, tmp_path)
    assert fault is not None
    out = tmp_path / ("out.pth" if fault.path.is_file() else "out")
    assert main(["repair", str(fault.path), str(out), "--reference", str(fault.reference)]) == 0
    assert "O01" in capsys.readouterr().out
    assert main(["repair", str(fault.path), str(out), "--reference", str(fault.reference)]) == 2  # it is there already


# -- the checkpoint's own values ---------------------------------------------------------------------------------------

WAY = Way("bf16", "all", 1e-3, 20)


@pytest.fixture(scope="module")
def tuned() -> Specimen:
    return fine_tuned_copy("llama_mha", WAY, steps=(20,))


def mended(tmp_path: Path, state: State, **options: Any) -> Repaired:
    """Write a broken copy of `llama_mha` beside its base, and repair it into `out`."""
    m = specimen("llama_mha")
    path, base = write("hf", state, tmp_path / "sick", m.config), write("hf", m.tensors, tmp_path / "base", m.config)
    return repair(str(path), str(tmp_path / "out"), str(base), **options)


def renamed(state: State, pattern: str, by: str) -> State:
    return {re.sub(pattern, by, name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        (r"^lm_head", "score_head"),
        (r"^model\.layers\.", "model.decoder.decoder.layers."),
        (r"_proj\.weight", "_proj.base_layer.weight"),
        (r"layers\.3\.", "layers.3.inner."),
    ],
)
def test_trained_tensors_get_their_names_back(pattern: str, by: str, tuned: Specimen, tmp_path: Path) -> None:
    done = mended(tmp_path, renamed(tuned.tensors, pattern, by))
    assert not done.taken and not done.lost and "names back" in done.done["K01"]
    assert equal(tmp_path / "out", write("hf", tuned.tensors, tmp_path / "tuned", None))


@pytest.mark.parametrize("order", ["qkv", "vkq"])
def test_fused_rows_are_split_in_the_order_that_they_have(order: str, tuned: Specimen, tmp_path: Path) -> None:
    state = dict(tuned.tensors)
    for layer in range(11):
        at = f"model.layers.{layer}.self_attn."
        state[f"{at}in_proj.weight"] = np.concatenate([state.pop(f"{at}{letter}_proj.weight") for letter in order])
    done = mended(tmp_path, state)
    assert not done.taken and not done.lost
    assert equal(tmp_path / "out", write("hf", tuned.tensors, tmp_path / "tuned", None))


@pytest.mark.parametrize("hide", ["unlike", "interleaved", "cut"])
def test_what_may_be_the_missing_tensor_is_not_left_out(hide: str, tuned: Specimen, tmp_path: Path) -> None:
    """Not even where the caller allows everything."""
    state, rng = dict(tuned.tensors), np.random.default_rng(0)
    at = "model.layers.2.self_attn."
    if hide == "unlike":  # trained so far that its content does not say what it was
        head = state.pop("lm_head.weight")
        state["score.weight"] = rng.normal(0, 0.02, head.shape).astype(head.dtype)
    elif hide == "interleaved":  # rows of q, k and v in turn
        parts = [state.pop(f"{at}{letter}_proj.weight") for letter in "qkv"]
        state[f"{at}qkv.weight"] = np.stack(parts, 1).reshape(-1, 64)
    else:  # in two halves
        whole = state.pop(f"{at}q_proj.weight")
        state |= {f"{at}q_proj.first.weight": whole[:32], f"{at}q_proj.second.weight": whole[32:]}
    with pytest.raises(TensorkeepError, match="could be it or hold it") as refused:
        mended(tmp_path, state, take=["*"], yes=True)
    assert refused.value.code == "K01" and not (tmp_path / "out").exists()
    assert refused.value.hint is not None and "--drop" in refused.value.hint


def test_what_is_missing_is_filled_only_by_name(tuned: Specimen, tmp_path: Path) -> None:
    lost = ["model.layers.1.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight"]
    state = {n: t for n, t in tuned.tensors.items() if n not in lost}
    for take in ([], [lost[0]]):
        with pytest.raises(TensorkeepError, match="is lost") as refused:
            mended(tmp_path / str(len(take)), state, take=take)
        assert refused.value.hint is not None and f"--take-from-reference {lost[1]}" in refused.value.hint
    with pytest.raises(TensorkeepError, match="nothing that is lost here"):
        mended(tmp_path / "2", state, take=["mlp.up_proj", "q_proj"])
    done = mended(tmp_path / "3", state, take=["mlp.up_proj"])
    assert done.taken == lost and not done.lost
    statuses = {d.name: d.status for d in compare(read(tmp_path / "3/out"), read(tmp_path / "3/sick"))}
    assert {n for n, status in statuses.items() if status != "equal"} == set(lost)


def test_what_would_go_is_said_and_needs_a_yes(tuned: Specimen, tmp_path: Path) -> None:
    state = {**tuned.tensors, "value_head.weight": np.ones((1, 64), np.float32) * np.arange(64, dtype=np.float32)}
    with pytest.raises(TensorkeepError, match=r"value_head\.weight") as refused:
        mended(tmp_path / "no", state)
    assert refused.value.hint is not None and "--yes" in refused.value.hint and not (tmp_path / "no/out").exists()
    done = mended(tmp_path / "yes", state, yes=True)
    assert done.lost == {"value_head.weight": "left out"}
    assert equal(tmp_path / "yes/out", write("hf", tuned.tensors, tmp_path / "tuned", None))


def test_training_state_beside_the_model_does_not_go_without_a_word(tuned: Specimen, tmp_path: Path) -> None:
    m = specimen("llama_mha")
    swapped = dict(tuned.tensors)
    gate, up = (f"model.layers.0.mlp.{word}_proj.weight" for word in ("gate", "up"))
    swapped[gate], swapped[up] = swapped[up], swapped[gate]
    moments = {f"optimizer.state.{n}.exp_avg": np.full(t.shape, 1e-3, np.float32) for n, t in swapped.items()}
    path = write("dcp", {**swapped, **moments}, tmp_path / "sick", m.config)
    base = write("hf", m.tensors, tmp_path / "base", m.config)
    with pytest.raises(TensorkeepError, match="optimizer"):
        repair(str(path), str(tmp_path / "out"), str(base))
    assert repair(str(path), str(tmp_path / "out"), str(base), yes=True).after.verdict == "ok"


def test_only_the_elements_that_are_no_numbers_come_from_the_reference(tuned: Specimen, tmp_path: Path) -> None:
    name = "model.layers.5.mlp.down_proj.weight"
    broken = tuned.tensors[name].copy()
    broken[3, :2] = np.nan
    done = mended(tmp_path, {**tuned.tensors, name: broken}, take=[name])
    wanted = tuned.tensors[name].copy()
    wanted[3, :2] = specimen("llama_mha").tensors[name][3, :2]
    made = read(tmp_path / "out").array(name)
    assert done.taken == [name] and made.tobytes() == wanted.tobytes()


def test_damaged_elements_among_trained_ones_are_not_guessed(tuned: Specimen, tmp_path: Path) -> None:
    name = "model.norm.weight"
    m = specimen("llama_mha")
    state = {**m.tensors, name: m.tensors[name].copy(), "lm_head.weight": tuned.tensors["lm_head.weight"]}
    state[name][5] = 1e30
    with pytest.raises(TensorkeepError, match="trained further") as refused:
        mended(tmp_path, state, take=["*"], yes=True)
    assert refused.value.code == "V07" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [2.0, 0.25, -1.0])
def test_a_factor_of_trained_values_is_undone_to_the_bit(factor: float, tuned: Specimen, tmp_path: Path) -> None:
    name = "model.layers.5.mlp.down_proj.weight"
    times = (tuned.tensors[name].astype(np.float32) * factor).astype(tuned.tensors[name].dtype)
    if factor < 0:  # turned signs look like any other content: they are not guessed
        with pytest.raises(TensorkeepError):
            mended(tmp_path, {**tuned.tensors, name: times})
        return
    done = mended(tmp_path, {**tuned.tensors, name: times})
    assert not done.taken and not done.lost
    assert equal(tmp_path / "out", write("hf", tuned.tensors, tmp_path / "tuned", None))


def test_an_order_free_digest_adds_up() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 5)).astype(np.float32)
    assert mark(a) == mark(a[::-1]) == mark(np.ascontiguousarray(a.T))
    parts = mark(a[:4]), mark(a[4:])
    assert mark(a)[1:] == tuple((x + y) % 2**64 for x, y in zip(parts[0][1:], parts[1][1:]))
    b = a.copy()
    b[0, 0], b[0, 1] = b[0, 0] + 1, b[0, 1] - 1
    assert mark(a) != mark(b)
