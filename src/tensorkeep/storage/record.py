"""Tensor records: what a checkpoint says of a tensor, without its data.

A record is a name, a dtype (in safetensors' spelling), a shape and the places of its bytes. Most tensors lie in one
place; a sharded DCP tensor lies in several blocks, each a rectangle of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Dtype(NamedTuple):
    """One element type: bits per element, torch's name, numpy's (or ml_dtypes') name; None where there is none."""

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


class Block(NamedTuple):
    """A stored rectangle of a tensor.

    `start`, `nbytes`: bytes in `file`. `offsets`, `shape`: where the rectangle lies in the whole tensor. `strides`
    (in elements) is None for row-major data. `archive`: the range holds a whole torch.save archive, not raw bytes.
    `crc`: CRC-32 of exactly these bytes, where the file holds one.
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
    """Name, dtype, shape and place of one stored tensor; no data.

    `encoding` is "plain" or the block-quantized type of a GGUF tensor ("Q4_1"), whose `dtype` is what it decodes to.
    `tied_to` names another tensor that lies in the very same bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    tied_to: str | None = None
    encoding: str = "plain"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in row-major order."""
        return nbytes(self.dtype, self.shape)

    @property
    def file(self) -> str:
        return self.blocks[0].file if self.blocks else ""

    def renamed(self, name: str) -> TensorRecord:
        return replace(self, name=name)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; packed sub-byte types round up.

    >>> nbytes("BF16", (2, 3))
    12
    """
    return (math.prod(shape) * DTYPES[dtype].bits + 7) // 8


MOST_DIMENSIONS = 32  # numpy 1.26 has no more; real checkpoints end at six
_LARGEST_SIZE = 1 << 62  # bytes, as if no dimension were empty: what numpy and torch can index


def checked_shape(value: Any, dtype: str | None = None) -> tuple[int, ...] | None:
    """Sizes out of an untrusted file as a shape, or None where they are no whole numbers or nothing could hold them.

    >>> checked_shape([2, 3]), checked_shape([2, -1]), checked_shape([1 << 40, 1 << 40])
    ((2, 3), None, None)
    """
    if not isinstance(value, (tuple, list)) or len(value) > MOST_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        return None
    shape = tuple(value)
    return shape if nbytes(dtype or "C128", tuple(max(n, 1) for n in shape)) < _LARGEST_SIZE else None


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def same_layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these strides mean row-major order (sizes of 1 and empty tensors do not care)."""
    return math.prod(shape) == 0 or all(
        size == 1 or stride == want for size, stride, want in zip(shape, strides, row_major(shape))
    )
