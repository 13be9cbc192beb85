"""Training is no fault: copies that AdamW trained raise no error, and faults on them are named all the same.

All 96 ways of training and all kinds of faults are counted by `python -m benchmarks.faults`.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorkeep.diagnosis.diagnosis import Diagnosis, diagnose
from tensorkeep.diagnosis.repairs import repair
from tests.fault_kinds.writing import write
from tests.faults import judge, make
from tests.fine_tuned import PARTS, Way, fine_tuned_copy
from tests.helpers import refused
from tests.specimens import BF16, FP32, Array, State, specimen

NORM = "model.layers.3.input_layernorm.weight"
DOWN = "model.layers.3.mlp.down_proj.weight"


def diagnosed(tmp_path: Path, state: State, base: State | None = None, model: str = "llama_mha") -> Diagnosis:
    m = specimen(model)
    path = write("hf", state, tmp_path / "copy", m.config)
    return diagnose(str(path), str(write("hf", base or m.tensors, tmp_path / "base", m.config)))


def errors(found: Diagnosis) -> list[str]:
    return [f"{f.code} {f.message}" for f in found.findings if f.severity == "error"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["llama_tied", "vit"])
def test_training_raises_no_error(model: str, dtype: str, part: str, tmp_path: Path) -> None:
    for rate in (1e-6, 1e-3):
        for steps in (1, 20):
            copy = fine_tuned_copy(model, Way(dtype, part, rate, steps), steps=(1, 20))
            assert errors(diagnosed(tmp_path / f"{rate}-{steps}", copy.tensors, model=model)) == []


@pytest.mark.parametrize(
    "kind",
    "rope_q_only rope_with_norms layers_reversed gate_up_swapped norms_swapped transposed_square vocabulary_permuted "
    "shard_order_of_columns gqa_regrouped embedding_overwritten vocabulary_padded norm_off_by_one zero_biases".split(),
)
def test_a_fault_on_a_fine_tuned_copy_is_named(kind: str, tmp_path: Path) -> None:
    for model in ("olmo2", "llama_bias"):
        fault = make(kind, model, 3, tmp_path, "fine_tuned_briefly")
        if fault is not None:
            document = diagnose(str(fault.path), str(fault.reference), fault.target).to_json()  # type: ignore[arg-type]
            assert judge(fault, document)[0] == "named", judge(fault, document)[1]


# -- faults of some values among trained ones -------------------------------------------------------------------------


def trained(part: str, rate: float = 1e-3) -> State:
    return dict(fine_tuned_copy("llama_tied", Way("fp32", part, rate, 20), steps=(1, 20)).tensors)


def found_of(tmp_path: Path, state: State, code: str) -> set[str]:
    """The tensors that errors of this code name; there are no errors of another."""
    found = [f for f in diagnosed(tmp_path, state, model="llama_tied").findings if f.severity == "error"]
    assert {f.code for f in found} <= {code}
    return {n for f in found for n in f.tensors}


@pytest.mark.parametrize(("factor", "rate"), [(1.5, 1e-3), (1.5, 1e-6), (0.9, 1e-6)])
def test_a_factor_on_one_of_few_trained_tensors_is_named(factor: float, rate: float, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    for part in ("lora", "all"):
        state = trained(part, rate)
        state[name] = state[name] * np.float32(factor)
        assert found_of(tmp_path / part, state, "V06") == {name}


@pytest.mark.parametrize("grid", [np.dtype(np.float16), np.dtype(ml_dtypes.float8_e4m3fn)])
def test_trained_and_small_tensors_went_through_what_the_others_went_through(
    grid: np.dtype[np.generic], tmp_path: Path
) -> None:
    """Trained values do not tell what they were; that all of them lie on the grid of the others does."""
    state = trained("lora")
    names = [n for n in state if n.endswith(("_proj.weight", "layernorm.weight", "embed_tokens.weight"))]
    state |= {n: state[n].astype(grid).astype(FP32) for n in names}
    base = specimen("llama_tied").tensors
    changed = {n for n in names if "proj" in n and not np.array_equal(state[n], base[n])}
    assert found_of(tmp_path, state, "V02") >= changed


def test_a_trained_copy_that_is_stored_in_eight_bits_lost_precision(tmp_path: Path) -> None:
    state = trained("all")
    names = [n for n in state if n.endswith("_proj.weight")]
    state |= {n: state[n].astype(ml_dtypes.float8_e4m3fn) for n in names}
    assert found_of(tmp_path, state, "V02") == set(names)


@pytest.mark.parametrize("what", ["rows", "element", "block"])
def test_values_that_no_training_makes_are_named_and_the_rest_is_not_reverted(what: str, tmp_path: Path) -> None:
    name, state = "model.layers.2.mlp.down_proj.weight", trained("all")
    state[name] = state[name].copy()
    at = {"rows": 5, "element": (3, 4), "block": (slice(2, 4), slice(8, 40))}[what]
    state[name][at] = {"rows": 0, "element": 2e30, "block": -700}[what]
    assert found_of(tmp_path, state, "V07") == {name}
    with refused("V07", name):
        repair(str(tmp_path / "copy"), str(tmp_path / "out"), str(tmp_path / "base"))
    words = [str(tmp_path / n) for n in ("copy", "out", "base")]
    assert repair(*words, take=[name], yes=True).taken == [name]  # whole, and said so


def test_a_head_that_was_trained_far_is_put_back_in_the_order_of_the_embedding(tmp_path: Path) -> None:
    """Its rows alone are too far from the reference's to be told apart; that they follow a known order is seen."""
    rng, base = np.random.default_rng(3), specimen("llama_mha").tensors
    head, embedding = (base[n].astype(FP32) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    far = head + head.std() * rng.normal(size=head.shape).astype(FP32)
    moved = {"lm_head.weight": np.roll(far, -1, 0), "model.embed_tokens.weight": np.roll(embedding, -1, 0)}
    found = diagnosed(tmp_path, {**base, **moved})
    (order,) = [f for f in found.findings if f.severity == "error"]
    assert (order.code, set(order.tensors)) == ("O04", set(moved))


# -- V02: precision ---------------------------------------------------------------------------------------------------


def test_values_that_merely_round_to_the_references_lost_no_precision(tmp_path: Path) -> None:
    """Every value moved by less than bf16 can show, in a wider file."""
    rng = np.random.default_rng(0)
    state = {
        n: (t.astype(FP32) * (1 + 1e-4 * rng.uniform(-1, 1, t.shape))).astype(FP32)
        for n, t in specimen("llama_mha").tensors.items()
    }
    found = diagnosed(tmp_path, state)
    assert errors(found) == [] and "V02" not in {f.code for f in found.findings}


def test_a_base_that_is_narrow_itself_lost_nothing(tmp_path: Path) -> None:
    state = {n: t.astype(FP32) for n, t in specimen("llama_mha").tensors.items()}
    state[NORM] = state[NORM] * np.float32(1 + 1e-5)
    state[NORM.replace("3", "4")] = state[NORM.replace("3", "4")] + np.float32(1e-5)
    assert "V02" not in {f.code for f in diagnosed(tmp_path, state).findings}


@pytest.mark.parametrize("through", [np.dtype(np.float16), BF16])
def test_precision_that_is_lost_is_named_tensor_by_tensor(through: np.dtype[np.generic], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    wide = {
        n: (t.astype(FP32) * (1 + 1e-3 * rng.uniform(-1, 1, t.shape))).astype(FP32)
        for n, t in specimen("llama_mha").tensors.items()
    }
    (finding,) = diagnosed(tmp_path, {**wide, DOWN: wide[DOWN].astype(through).astype(FP32)}, wide).findings[:1]
    assert (finding.code, list(finding.tensors)) == ("V02", [DOWN])


def blocks_of(weight: Array, side: int, dtype: np.dtype[np.generic], top: float) -> tuple[Array, Array]:
    """Quantize in square blocks: codes as floats, and the weight that they stand for."""
    codes, back = np.zeros(weight.shape, FP32), np.zeros(weight.shape, FP32)
    for row in range(0, weight.shape[0], side):
        for column in range(0, weight.shape[1], side):
            at = slice(row, row + side), slice(column, column + side)
            scale = np.abs(weight[at]).max() / top
            codes[at] = np.round(weight[at] / scale) if dtype.kind == "i" else (weight[at] / scale).astype(dtype)
            back[at] = codes[at] * scale
    return codes, back


@pytest.mark.parametrize(("dtype", "top"), [(ml_dtypes.float8_e4m3fn, 448.0), (np.int8, 127.0)])
@pytest.mark.parametrize("what", ["codes", "values"])
def test_codes_taken_for_values_are_no_training(what: str, dtype: type, top: float, tmp_path: Path) -> None:
    state = dict(specimen("llama_mha").tensors)
    names = [n for n in state if n.endswith("_proj.weight")]
    for name in names:
        made = blocks_of(state[name].astype(FP32), 32, np.dtype(dtype), top)
        state[name] = made[what == "values"].astype(BF16)
    found = diagnosed(tmp_path, state)
    code = {"codes": "Q01", "values": "V02"}[what]
    assert found.causes == [code] and {n for f in found.findings if f.code == code for n in f.tensors} == set(names)


# -- V06, V07: how far and how many -----------------------------------------------------------------------------------


def test_a_move_of_every_matrix_that_no_training_makes_is_an_error(tmp_path: Path) -> None:
    """The direction stays, and the sizes grow by another factor in every row: no single factor, no grid."""
    rng = np.random.default_rng(2)
    state = {
        n: (t.astype(FP32) * 50 * np.exp(rng.normal(0, 0.3, t.shape))).astype(FP32) if t.ndim > 1 else t
        for n, t in specimen("llama_mha").tensors.items()
    }
    assert [line[:3] for line in errors(diagnosed(tmp_path, state))] == ["V06"]


@pytest.mark.parametrize(("count", "named"), [(1, ["V07"]), (2, [])])
def test_elements_that_moved_to_their_neighbour(count: int, named: list[str], tmp_path: Path) -> None:
    """In one tensor it is a flipped bit; in several it is a step of training that rounded away nearly everywhere."""
    state = dict(specimen("llama_mha").tensors)
    for layer in range(count):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        state[name] = state[name].copy()
        state[name].view(np.uint16)[0, 0] ^= 1
    assert diagnosed(tmp_path, state).causes == named
