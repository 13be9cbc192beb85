"""Records: the dtypes are torch's and numpy's, sizes are what those take, hostile shapes are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.formats.arrays import np_dtype
from tensorkeep.storage.record import (
    DTYPES,
    FROM_TORCH,
    SPELLINGS,
    Block,
    TensorRecord,
    checked_shape,
    nbytes,
    row_major,
    same_layout,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_has_the_width_of_torch_and_numpy(dtype: str) -> None:
    bits, in_torch, in_numpy, floating = DTYPES[dtype]
    if in_torch and hasattr(torch, in_torch) and bits >= 8:
        assert torch.empty(1, dtype=getattr(torch, in_torch)).element_size() * 8 == bits
        assert getattr(torch, in_torch).is_floating_point == floating
        assert FROM_TORCH[in_torch] == dtype
    if in_numpy:
        assert np_dtype(dtype).itemsize * 8 == bits


@given(shapes, st.sampled_from(sorted(FROM_TORCH.values())))
def test_bytes_and_strides_are_those_of_a_torch_tensor(shape: tuple[int, ...], dtype: str) -> None:
    made = torch.empty(shape, dtype=torch.uint8)
    record = TensorRecord("a", dtype, shape, (Block("f", 0, 0, (0,) * len(shape), shape),))
    assert record.elements == made.numel() and record.nbytes == made.numel() * DTYPES[dtype].bits // 8 == nbytes(
        dtype, shape
    )
    assert row_major(shape) == made.stride() and same_layout(shape, made.stride())
    assert record.renamed("b").name == "b" and record.file == "f"


@given(shapes, st.data())
def test_a_layout_is_row_major_exactly_where_torch_says_contiguous(shape: tuple[int, ...], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    turned = torch.empty(shape).permute(order)
    assert same_layout(tuple(turned.shape), turned.stride()) == turned.is_contiguous()


@given(st.lists(st.integers(0, 1 << 50), max_size=40))
def test_a_checked_shape_can_be_held_by_numpy(sizes: list[int]) -> None:
    import numpy as np

    shape = checked_shape(sizes, "U8")
    if shape is not None:
        assert shape == tuple(sizes)
        if 0 in shape:
            assert np.zeros(shape, np.uint8).shape == shape
    else:
        assert len(sizes) > 32 or max(sizes) >= 1 << 48 or math.prod(max(n, 1) for n in sizes) >= 1 << 62


@pytest.mark.parametrize(
    "value", [None, 3, "ab", [1.0], [True], [-1], [None], [[1]], {1: 2}, [1 << 48], [1 << 47, 1 << 47], [1] * 33]
)
def test_what_is_no_shape_is_none(value: Any) -> None:
    assert checked_shape(value) is None


def test_every_spelling_means_a_dtype() -> None:
    assert set(SPELLINGS.values()) == set(DTYPES)
    assert SPELLINGS["bf16"] == SPELLINGS["bfloat16"] == "BF16"
