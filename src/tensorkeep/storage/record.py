"""Tensor records: what a checkpoint says about a tensor, without its data.

A record is a name, a dtype (in safetensors' spelling), a shape and the positions of its bytes. Most tensors lie in
one place; a sharded DCP tensor lies in several blocks, each a rectangle of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple


class Dtype(NamedTuple):
    """One element type.

    Attributes:
        bits: bits per element.
        torch: its name in torch; None where torch has none.
        numpy: its name in numpy or ml_dtypes; None where they have none.
        floating: whether it is a real floating-point type.
    """

    bits: int
    torch: str | None
    numpy: str | None
    floating: bool


# every dtype of safetensors 0.8, by its name there; and C128, which torch alone can keep
DTYPES: dict[str, Dtype] = {
    "F64": Dtype(64, "float64", "float64", True),
    "F32": Dtype(32, "float32", "float32", True),
    "F16": Dtype(16, "float16", "float16", True),
    "BF16": Dtype(16, "bfloat16", "bfloat16", True),
    "F8_E4M3": Dtype(8, "float8_e4m3fn", "float8_e4m3fn", True),
    "F8_E5M2": Dtype(8, "float8_e5m2", "float8_e5m2", True),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu", "float8_e8m0fnu", True),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz", "float8_e4m3fnuz", True),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz", "float8_e5m2fnuz", True),
    "F6_E2M3": Dtype(6, None, None, True),
    "F6_E3M2": Dtype(6, None, None, True),
    "F4": Dtype(4, "float4_e2m1fn_x2", None, True),
    "C64": Dtype(64, "complex64", "complex64", False),
    "C128": Dtype(128, "complex128", "complex128", False),
    "I64": Dtype(64, "int64", "int64", False),
    "I32": Dtype(32, "int32", "int32", False),
    "I16": Dtype(16, "int16", "int16", False),
    "I8": Dtype(8, "int8", "int8", False),
    "U64": Dtype(64, "uint64", "uint64", False),
    "U32": Dtype(32, "uint32", "uint32", False),
    "U16": Dtype(16, "uint16", "uint16", False),
    "U8": Dtype(8, "uint8", "uint8", False),
    "BOOL": Dtype(8, "bool", "bool", False),
}
# torch packs two F4 into one element and counts it once, in its shapes too: only safetensors' count is kept here
FROM_TORCH = {d.torch: name for name, d in DTYPES.items() if d.torch and d.bits >= 8}
SPELLINGS = {  # what people type after --dtype
    **{name.lower(): name for name in DTYPES},
    **{d.torch: name for name, d in DTYPES.items() if d.torch},
    "fp32": "F32",
    "float": "F32",
    "fp16": "F16",
    "half": "F16",
    "fp64": "F64",
    "double": "F64",
    "fp8": "F8_E4M3",
    "e4m3": "F8_E4M3",
    "e5m2": "F8_E5M2",
}


# ggml's block-quantized types that are written here: elements of a block, and its bytes (ggml-common.h)
BLOCK_TYPES = {"Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18)}
# with those that are passed on as they lie, where nothing changes in them
PASSED_BLOCKS = {
    **BLOCK_TYPES,
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
    **{"IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82)},
    **{"IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)},
    **{"TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17)},
}
# types that llama.cpp's own tool makes, by its words
OTHER_BLOCKS = (
    *("Q2_K", "Q2_K_S", "Q3_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K", "Q4_K_S", "Q4_K_M", "Q5_K", "Q5_K_S", "Q5_K_M"),
    *("Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)


class Block(NamedTuple):
    """A stored rectangle of a tensor.

    Attributes:
        file: name of the file that holds it.
        start: its first byte there.
        nbytes: its number of bytes there.
        offsets: index of its first element in the whole tensor, one number per dimension.
        shape: its sizes.
        strides: steps between neighbours, in elements; None for row-major data.
        archive: the byte range holds a whole torch.save archive, not raw bytes.
        crc: CRC-32 of exactly these bytes, where the file holds one.
    """

    file: str
    start: int
    nbytes: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    archive: bool = False
    crc: int | None = None


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Name, dtype, shape and position of one stored tensor; no data.

    Attributes:
        name: its name in the checkpoint.
        dtype: its dtype as safetensors spells it, e.g. "BF16"; for an encoded tensor what it decodes to.
        shape: its sizes.
        blocks: where its bytes lie; several for a sharded tensor.
        tied_to: name of another tensor that lies in the very same bytes.
        encoding: "plain", or the block-quantized type of a GGUF tensor, e.g. "Q4_1".

    Example:
        >>> record = TensorRecord("w", "BF16", (2, 3), (Block("model.safetensors", 64, 12, (0, 0), (2, 3)),))
        >>> record.nbytes, record.file
        (12, 'model.safetensors')
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    tied_to: str | None = None
    encoding: str = "plain"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in row-major order, decoded."""
        return nbytes(self.dtype, self.shape)

    @property
    def file(self) -> str:
        """The file that holds its first block; empty where it has none."""
        return self.blocks[0].file if self.blocks else ""

    def renamed(self, name: str) -> TensorRecord:
        """Return the same record under another name."""
        return replace(self, name=name)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor; types below one byte are packed, rounded up.

    Args:
        dtype: a dtype as safetensors spells it.
        shape: sizes of the tensor.

    Example:
        >>> nbytes("BF16", (2, 3))
        12
    """
    return _nbytes(dtype, tuple(shape))


@lru_cache(1 << 12)  # a checkpoint of 100,000 tensors has a few dozen shapes, and each is asked for ten times
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return (math.prod(shape) * DTYPES[dtype].bits + 7) // 8


MOST_DIMENSIONS = 32  # numpy 1.26 has no more; real checkpoints end at six
_LARGEST_SIZE = 1 << 62  # bytes, as if no dimension were empty: what numpy and torch can index


def checked_shape(value: Any, dtype: str | None = None) -> tuple[int, ...] | None:
    """Turn sizes from an untrusted file into a shape.

    Args:
        value: what the file gives.
        dtype: the tensor's dtype; where it is not known, the widest one is assumed.

    Returns:
        The shape; None where the sizes are no whole numbers, or no machine could hold such a tensor.

    Example:
        >>> checked_shape([2, 3]), checked_shape([2, -1]), checked_shape([1 << 40, 1 << 40])
        ((2, 3), None, None)
    """
    if not isinstance(value, (tuple, list)) or len(value) > MOST_DIMENSIONS:
        return None
    for n in value:
        if type(n) is not int or not 0 <= n < 1 << 48:
            return None
    shape = tuple(value)
    return shape if nbytes(dtype or "C128", tuple(max(n, 1) for n in shape)) < _LARGEST_SIZE else None


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor, in elements.

    Args:
        shape: sizes of the tensor.

    Example:
        >>> row_major((2, 3, 4))
        (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def same_layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether these strides mean row-major order (dimensions of size 1 and empty tensors do not care).

    Args:
        shape: sizes of the tensor.
        strides: its strides, in elements.

    Example:
        >>> same_layout((2, 3), (3, 1)), same_layout((2, 3), (1, 2))
        (True, False)
    """
    return math.prod(shape) == 0 or all(
        size == 1 or stride == want for size, stride, want in zip(shape, strides, row_major(shape))
    )
