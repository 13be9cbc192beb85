"""Faults of values (V): fresh weights, norms at a default, zeros, NaN, casts, scale and noise, damaged elements."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.fault_kinds.change import Change, changed_names, edited, kind, moved, some, some_layers
from tests.fault_kinds.names import EMBEDDING, HEAD
from tests.specimens import BF16, FP32, Array, Specimen

Rng = np.random.Generator


def fresh(rng: Rng, t: Array) -> Array:
    """Return random values as some initialiser draws them."""
    fan = t.shape[1] if t.ndim > 1 else t.size
    way = int(rng.integers(0, 4))
    if way == 0:
        return rng.normal(0, 0.02, t.shape)
    if way == 1:
        return rng.uniform(-1, 1, t.shape) / np.sqrt(fan)
    if way == 2:
        return rng.normal(0, np.sqrt(2 / (t.shape[0] + fan)), t.shape)
    return np.clip(rng.normal(0, 0.02, t.shape), -0.04, 0.04)


# -- never trained --------------------------------------------------------------------------------------------------


@kind("V03")
def reinitialised_tensor(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.matrices)
    return Change(edited(m, names, lambda t: fresh(rng, t)), names)


@kind("V03")
def reinitialised_role(m: Specimen, rng: Rng) -> Change | None:
    names = m.role(str(rng.choice(["q", "k", "v", "o", "down"])), None, "weight")
    return Change(edited(m, names, lambda t: fresh(rng, t)), names)


@kind("V03")
def reinitialised_head(m: Specimen, rng: Rng) -> Change | None:
    names = [n for n in (HEAD, "classifier.weight") if n in m.tensors]
    return Change(edited(m, names, lambda t: fresh(rng, t)), names) if names else None


@kind("V03")
def reinitialised_embedding(m: Specimen, rng: Rng) -> Change | None:
    return Change(edited(m, [EMBEDDING], lambda t: fresh(rng, t)), [EMBEDDING]) if m.language else None


@kind("V03")
def reinitialised_layer(m: Specimen, rng: Rng) -> Change | None:
    """Make a whole layer fresh: matrices random, norms one, biases zero; three findings of one cause are right."""
    inside = m.of_layer(int(rng.integers(0, m.layers)))
    weights = [n for n in inside if m.tensors[n].ndim == 2]
    norms = [n for n in inside if n in m.norms]
    state = {}
    for name, tensor in m.tensors.items():
        if name in weights:
            state[name] = rng.normal(0, 0.02, tensor.shape).astype(tensor.dtype)
        elif name in inside:
            state[name] = np.full_like(tensor, 1 if name in norms else 0)
        else:
            state[name] = tensor
    return Change(state, weights, also=("V04", "V05"))


@kind("V03")
def reinitialised_everything(m: Specimen, rng: Rng) -> Change | None:
    weights = [n for n, t in m.tensors.items() if t.ndim > 1]
    state = edited(m, weights, lambda t: rng.normal(0, 0.02, t.shape))
    state |= {n: np.full_like(t, 1 if n in m.norms else 0) for n, t in m.tensors.items() if t.ndim == 1}
    return Change(state, also=("V04", "V05"))


@kind("V04")
def norm_ones(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.norms, 1, 3)
    return Change(edited(m, names, np.ones_like), names)


@kind("V04")
def norms_all_ones(m: Specimen, rng: Rng) -> Change | None:
    return Change(edited(m, m.norms, np.ones_like), m.norms)


@kind("V04")
def norm_zeros(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.norms, 1, 3)
    return Change(edited(m, names, np.zeros_like), names)


@kind("V04")
def norm_off_by_one(m: Specimen, rng: Rng) -> Change | None:
    by = float(rng.choice([-1.0, 1.0]))
    names = m.norms if rng.random() < 0.5 else some(rng, m.norms, 1, 3)
    return Change(edited(m, names, lambda t: t + by), names)


@kind("V05")
def zero_tensor(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.matrices, 1, 2)
    return Change(edited(m, names, np.zeros_like), names)


@kind("V05")
def zero_head(m: Specimen, rng: Rng) -> Change | None:
    names = [n for n in (HEAD, EMBEDDING) if n in m.tensors][:1]
    return Change(edited(m, names, np.zeros_like), names) if names else None


@kind("V05")
def zero_biases(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, [n for n in m.tensors if n.endswith(".bias")], 1, 4)
    return Change(edited(m, names, np.zeros_like), names) if names else None


# -- NaN and damaged elements ---------------------------------------------------------------------------------------


def poison(m: Specimen, rng: Rng, value: float) -> Change:
    names = some(rng, [*m.matrices, *m.norms])
    count = int(rng.choice([1, 3, 20]))

    def put(t: Array) -> Array:
        flat = t.ravel().copy()
        flat[rng.choice(flat.size, min(count, flat.size), replace=False)] = value
        return flat.reshape(t.shape)

    return Change(edited(m, names, put), names)


@kind("V01")
def nan(m: Specimen, rng: Rng) -> Change | None:
    return poison(m, rng, np.nan)


@kind("V01")
def infinite(m: Specimen, rng: Rng) -> Change | None:
    return poison(m, rng, float(rng.choice([np.inf, -np.inf])))


@kind("V01")
def nan_everywhere(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.matrices, 1, 2)
    return Change(edited(m, names, lambda t: np.full_like(t, np.nan)), names)


def flip(rng: Rng, t: Array, bits: list[int], count: int) -> Array:
    """Flip one bit of `bits` in each of `count` elements, never into NaN or infinity."""
    word = np.dtype(f"u{t.dtype.itemsize}")
    out = t.copy().ravel()
    for at in rng.permutation(out.size):
        turned = (out.view(word)[at] ^ word.type(1 << int(rng.choice(bits)))).reshape(1).view(t.dtype)
        if np.isfinite(turned.astype(FP32)[0]) and out[at] != 0:
            out[at], count = turned[0], count - 1
        if not count:
            break
    return out.reshape(t.shape)


def flipped(m: Specimen, rng: Rng, which: str) -> Change:
    names = some(rng, [*m.matrices, *m.norms])
    mantissa = {BF16: 7, FP32: 23}[m.tensors[names[0]].dtype]
    last = 8 * m.tensors[names[0]].itemsize - 1
    bits = {"exponent": list(range(mantissa, last)), "sign": [last], "mantissa": list(range(mantissa))}[which]
    count = int(rng.choice([1, 1, 3]))
    return Change(moved(m, names, lambda t: flip(rng, t, bits, count)), names, note=which)


@kind("V07")
def bit_flip_exponent(m: Specimen, rng: Rng) -> Change | None:
    return flipped(m, rng, "exponent")


@kind("V07")
def bit_flip_sign(m: Specimen, rng: Rng) -> Change | None:
    return flipped(m, rng, "sign")


@kind("V07")
def bit_flip_mantissa(m: Specimen, rng: Rng) -> Change | None:
    return flipped(m, rng, "mantissa")


@kind("V07")
def damaged_block(m: Specimen, rng: Rng) -> Change | None:
    """Overwrite a run of elements with zeros (a lost page), one value, or rubbish."""
    names = some(rng, m.matrices)
    size = int(rng.integers(32, 1 + min(512, m.tensors[names[0]].size // 4)))
    way = int(rng.integers(0, 3))

    def damage(t: Array) -> Array:
        flat = t.ravel().copy()
        at = int(rng.integers(0, flat.size - size))
        rubbish = np.exp(rng.normal(0, 8, size)) * rng.choice([-1, 1], size)
        flat[at : at + size] = (0.0, 7.0, np.clip(rubbish, -1e30, 1e30))[way]
        return flat.reshape(t.shape)

    return Change(edited(m, names, damage), names)


@kind("V07", "V05")
def rows_lost(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.matrices)

    def lose(t: Array) -> Array:
        t[rng.choice(len(t), max(1, len(t) // 50), replace=False)] = 0
        return t

    return Change(edited(m, names, lose), names)


# -- precision ------------------------------------------------------------------------------------------------------


def cast_and_back(m: Specimen, names: list[str], dtype: object) -> Change | None:
    with np.errstate(over="ignore", invalid="ignore"):
        state = edited(m, names, lambda t: t.astype(np.dtype(dtype)).astype(FP32))
    changed = changed_names(m, state)
    finite = all(np.isfinite(state[n].astype(FP32)).all() for n in changed)
    return Change(state, changed) if changed and finite else None


@kind("V02")
def through_e4m3(m: Specimen, rng: Rng) -> Change | None:
    return cast_and_back(m, m.matrices, ml_dtypes.float8_e4m3fn)


@kind("V02")
def through_e5m2(m: Specimen, rng: Rng) -> Change | None:
    return cast_and_back(m, m.matrices, ml_dtypes.float8_e5m2)


@kind("V02")
def through_e4m3_some_layers(m: Specimen, rng: Rng) -> Change | None:
    layers = some_layers(m, rng)
    return cast_and_back(
        m, [n for layer in layers for n in m.of_layer(layer) if n in m.matrices], ml_dtypes.float8_e4m3fn
    )


@kind("V02")
def through_bf16(m: Specimen, rng: Rng) -> Change | None:
    change = cast_and_back(m, list(m.tensors), BF16)
    if change:
        change.lax = True  # bf16 is what most models are served in: an info or a warning names it as well
    return change


@kind("V02")
def through_fp16(m: Specimen, rng: Rng) -> Change | None:
    if m.config["dtype"] != "float32":
        return None  # bf16 loses nearly nothing in fp16
    change = cast_and_back(m, list(m.tensors), np.float16)
    if change:
        change.lax = True
    return change


@kind("V02", "V06")
def through_int8(m: Specimen, rng: Rng) -> Change | None:
    """Quantize row by row to int8 and back."""

    def quantize(t: Array) -> Array:
        scale = np.abs(t).max(1, keepdims=True) / 127
        return np.round(t / scale) * scale

    names = m.matrices
    return Change(edited(m, names, quantize), changed_names(m, edited(m, names, quantize)))


@kind("V02")
def stored_narrower(m: Specimen, rng: Rng) -> Change | None:
    """Store the matrices as fp8: no value overflows, but three bits of mantissa are left."""
    state = {n: t.astype(ml_dtypes.float8_e4m3fn) if n in m.matrices else t for n, t in m.tensors.items()}
    return Change(state, codes=("V02", "Q01"), forms=("hf", "dcp"), also=("Q01", "V02"))


# -- scale, drift, noise --------------------------------------------------------------------------------------------


def scaled(m: Specimen, rng: Rng, factors: list[float]) -> Change:
    factor = float(rng.choice(factors))
    role = str(rng.choice(["q", "v", "o", "down"]))
    names = m.role(role, None, "weight") if rng.random() < 0.5 else some(rng, m.matrices, 1, 3)
    return Change(edited(m, names, lambda t: t * np.float32(factor)), names, note=f"x{factor}")


@kind("V06")
def scaled_by_power_of_two(m: Specimen, rng: Rng) -> Change | None:
    return scaled(m, rng, [2.0, 0.5, 8.0, 1 / 64])


@kind("V06")
def scaled_a_bit(m: Specimen, rng: Rng) -> Change | None:
    return scaled(m, rng, [0.9, 1.1, 0.7071, 1.5])


@kind("V06")
def drift_one_percent(m: Specimen, rng: Rng) -> Change | None:
    return scaled(m, rng, [1.01, 0.99])


@kind("V06")
def sign_turned(m: Specimen, rng: Rng) -> Change | None:
    return scaled(m, rng, [-1.0])


@kind("V06")
def norm_scaled(m: Specimen, rng: Rng) -> Change | None:
    names = some(rng, m.norms, 1, 3)
    factor = float(rng.choice([2.0, 0.5, 1.1]))
    return Change(edited(m, names, lambda t: t * np.float32(factor)), names)


def noisy(m: Specimen, rng: Rng, level: float) -> Change:
    names = some(rng, m.matrices, 1, 2)
    return Change(edited(m, names, lambda t: t + rng.normal(0, level * t.std(), t.shape)), names)


@kind("V06")
def noise_ten_percent(m: Specimen, rng: Rng) -> Change | None:
    return noisy(m, rng, 0.1)


@kind("V06")
def noise_three_percent(m: Specimen, rng: Rng) -> Change | None:
    return noisy(m, rng, 0.03)


@kind("V06")
def shards_summed_twice(m: Specimen, rng: Rng) -> Change | None:
    """Double o_proj and down_proj of every layer, as partial sums of tensor parallelism added twice."""
    names = [*m.role("o", None, "weight"), *m.role("down", None, "weight")]
    return Change(edited(m, names, lambda t: t * np.float32(2)), names)
