"""The encoder: equal to bitsandbytes where that is installed, its own laws everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import encoding
from tensorkeep.quantization.encoding import Encoding

SHAPES = [(5, 7), (96, 96), (33, 176), (10, 30), (1, 1), (7, 65)]
KINDS = [Encoding("nf4"), Encoding("nf4", 32, True), Encoding("fp4", 128), Encoding("fp4", 64, True), Encoding("int8")]


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.05).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 99))
def test_no_value_moves_further_than_half_the_widest_gap_of_its_block(
    kind: Encoding, shape: tuple[int, int], seed: int
) -> None:
    weight = values(shape, seed)
    made = encoding.through(weight, kind)
    if kind.kind == "int8":
        limit = np.abs(weight).max(1, keepdims=True) * (0.5 / 127 + 2e-3)
        assert (np.abs(made - weight) <= limit).all()
        return
    top = encoding.absolute_maxima(weight.reshape(-1), kind.block)
    levels = np.sort(encoding.LEVELS[kind.kind])
    wide = np.repeat(top, kind.block)[: weight.size] * (np.diff(levels).max() / 2 + (0.05 if kind.double else 1e-6))
    assert (np.abs(made - weight).reshape(-1) <= wide + 0.02 * kind.double).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_single_quantized_values_are_a_fixed_point(kind: str) -> None:
    made = encoding.through(values((33, 176)), Encoding(kind))
    assert np.array_equal(encoding.through(made, Encoding(kind)), made)


def test_a_value_on_the_border_takes_the_lower_level() -> None:
    table = encoding.LEVELS["nf4"]
    border = (table[9] + table[10]) / np.float32(2)
    flat = np.array([1, border, np.nextafter(border, np.float32(2))], np.float32)
    assert encoding.four_bit_codes(flat, np.ones(1, np.float32), "nf4", 4).tolist() == [15, 9, 10]


def test_the_mean_is_summed_as_torch_sums_it() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in (*range(1, 40), 64, 128, 176, 300, 1000, 4099, 20000):
            some = np.random.default_rng(size).random(size).astype(np.float32)
            assert encoding.mean(some) == torch.from_numpy(some).mean().numpy()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    import torch

    torch.set_num_threads(1)
    weight = values(shape, 3)
    flat = weight.reshape(-1)
    for kind in KINDS[:-1]:
        stored, state = functional.quantize_4bit(
            torch.from_numpy(weight), blocksize=kind.block, compress_statistics=kind.double, quant_type=kind.kind
        )
        absmax = encoding.absolute_maxima(flat, kind.block)
        codes = encoding.four_bit_codes(flat, absmax, kind.kind, kind.block)
        assert np.array_equal(codes, quant_codes.nibbles(stored.numpy().reshape(-1), flat.size))
        if kind.double:
            eight, outer, offset = encoding.nested(absmax)
            assert offset == state.offset.numpy() and np.array_equal(outer, state.state2.absmax.numpy())
            assert np.array_equal(eight, state.absmax.numpy())
        else:
            assert np.array_equal(absmax, state.absmax.numpy())
