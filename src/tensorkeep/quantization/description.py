"""What the files say about one quantized weight, read and checked: its state, and the tensors beside it.

What a state lacks (Q01) or contradicts (Q06) is kept as a problem of the weight and never raised: a reader who only
lists tensors must not stumble over it. The layouts are in `stored`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorkeep.errors import shown
from tensorkeep.formats.view import StateView
from tensorkeep.storage.certificate import unique
from tensorkeep.storage.record import DTYPES, FROM_TORCH, TensorRecord, checked_shape

FOUR_BITS = ("nf4", "fp4")
QUANT_STATE = ".quant_state.bitsandbytes__"
NEEDED_ROLES, NESTED_ROLES = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("weight_scale_inv", "weight_scale", "weight.scale", "_weight_scale")  # beside the weight, by module
EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two: exponents plus 127
ZEROS = ("weight_zero_point", "_weight_zero_point")
TORCHAO = "._weight_qdata"  # torchao flattens its tensors into `_weight_qdata` and `_weight_scale`
# how names of codes end, and how the name of the weight that they stand for ends
ENDS = {TORCHAO: ".weight", ".qweight": ".weight", ".weight_packed": ".weight", "_blocks": ""}
_LARGEST_STATE = 1 << 16  # bytes of a quant_state; real ones have some 170


class WeightProblem(NamedTuple):
    """What is wrong with a quantized weight's own description.

    Attributes:
        code: Q01 where something is missing, Q06 where it contradicts itself.
        message: one sentence.
    """

    code: str
    message: str


class Nested(NamedTuple):
    """Double quantization: the scales are 8-bit codes themselves.

    Attributes:
        blocksize: number of scales that share one scale of their own.
        offset: what is added to each scale after decoding.
    """

    blocksize: int
    offset: float


def float_name(name: str) -> str:
    """Return the name that the weight of these codes has where it is not quantized.

    Args:
        name: of the codes, stored or in the model.

    Example:
        >>> float_name("model.layers.0.mlp.up_proj.qweight"), float_name("lm_head.weight")
        ('model.layers.0.mlp.up_proj.weight', 'lm_head.weight')
    """
    end = next((e for e in ENDS if name.endswith(e)), None)
    return name if end is None else name.removesuffix(end) + ENDS[end]


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantized weight of a checkpoint, as its files describe it.

    A weight with problems cannot be dequantized.

    Attributes:
        name: stored name of its codes.
        kind: "nf4", "fp4", "int8", "fp8", a key of `kinds.KINDS`, or "4bit" where nothing says which.
        shape: shape of the weight that the codes stand for; None where nothing says.
        parts: role ("absmax", "SCB", "scale", ...) -> stored name of the tensor that has it.
        block: what one scale reaches: a number of flat elements (nf4, fp4), or (rows, columns).
        nested: how the scales are quantized themselves; None where they are floats.
        dtype: torch's name of the dtype that the weight had; None where nothing says.
        problems: what is wrong with the description.
        bits: of one code, in the kinds of `kinds.KINDS`.
        version: of the format, where files of two are told apart (gptq).
        stacked: the first dimension counts experts, each a matrix with scales of its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parts: Mapping[str, str]
    block: int | tuple[int, int] | None = None
    nested: Nested | None = None
    dtype: str | None = None
    problems: tuple[WeightProblem, ...] = ()
    bits: int = 0
    version: int = 0
    stacked: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight as rows and columns: of a stack those of all its matrices, one below the other."""
        assert self.shape is not None
        if self.stacked:
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        """Number of elements that the codes stand for."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def held(self) -> bool:
        """Whether a layer here computes with these codes: a matrix as bitsandbytes writes it."""
        plain = self.kind in FOUR_BITS or (self.kind == "int8" and "SCB" in self.parts)
        return plain and self.shape is not None and len(self.shape) == 2 and self.stands_for == self.name

    @property
    def stands_for(self) -> str:
        """The stored name that the weight would have if it were not quantized."""
        return float_name(self.name)

    @property
    def stored(self) -> list[str]:
        """The names of all its stored tensors, codes first."""
        return [self.name, *self.parts.values()]


# -- bitsandbytes, 4 bits -----------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """A description being read, with the problems met on the way."""

    view: StateView
    name: str
    problems: list[WeightProblem] = field(default_factory=list)

    def missing(self, what: str) -> None:
        """Note that something is missing (Q01)."""
        self.problems.append(WeightProblem("Q01", what))

    def wrong(self, what: str) -> None:
        """Note a contradiction (Q06)."""
        self.problems.append(WeightProblem("Q06", what))


def four_bit(view: StateView, name: str, parts: dict[str, str]) -> QuantizedWeight:
    """Describe an nf4 or fp4 weight of bitsandbytes; `parts` maps roles to stored names."""
    reading = _Reading(view, name)
    states = [role for role in parts if role.startswith("state:")]
    if name not in view:
        reading.wrong("scales and state without the packed codes they belong to")
    if not parts:
        reading.missing("packed codes without scales, map and state")
        return QuantizedWeight(name, "4bit", None, parts, problems=tuple(reading.problems))
    absent = [role for role in NEEDED_ROLES if role not in parts] + ([] if states else ["quant_state"])
    if absent:
        reading.missing(f"no {', '.join(absent)}")
    if len(states) > 1:
        reading.wrong(f"{len(states)} states: {', '.join(s.removeprefix('state:') for s in states)}")
    kind = states[0].removeprefix("state:") if states else "4bit"
    state = _state(reading, parts[states[0]]) if states else {}
    parts = {("state" if role in states[:1] else role): n for role, n in parts.items()}
    shape, block, nested = _described(reading, state, kind, parts) if state else (None, None, None)
    if name in view and shape is not None and block is not None:
        _check_sizes(reading, shape, block, nested, parts)
    dtype = state.get("dtype") if isinstance(state.get("dtype"), str) else None
    if state and dtype not in FROM_TORCH:
        reading.wrong(f"dtype {shown(state.get('dtype'))}")
    return QuantizedWeight(name, kind, shape, parts, block, nested, dtype, tuple(reading.problems))


def _state(reading: _Reading, name: str) -> dict[str, Any]:
    """Read the JSON of a quant_state tensor; {} and a problem where it is none."""
    record = reading.view[name]
    if record.dtype != "U8" or record.nbytes > _LARGEST_STATE:
        reading.wrong(f"its quant_state is {record.dtype}{list(record.shape)}, not a short text in bytes")
        return {}
    try:
        found = json.loads(bytes(reading.view.bytes(name)).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        reading.wrong("its quant_state is not JSON")
        return {}
    if not isinstance(found, dict):
        reading.wrong(f"its quant_state is {shown(found)}, not an object")
        return {}
    return found


def _described(
    reading: _Reading, state: Mapping[str, Any], kind: str, parts: Mapping[str, str]
) -> tuple[tuple[int, ...] | None, int | None, Nested | None]:
    """Return shape, block size and nesting as the state gives them."""
    if kind not in FOUR_BITS or state.get("quant_type") != kind:
        reading.wrong(f"quant_type {shown(state.get('quant_type'))} under a state called {shown(kind)}")
    shape = checked_shape(state.get("shape"))
    if shape is None or not math.prod(shape):
        reading.wrong(f"shape {shown(state.get('shape'))}")
        shape = None
    block = _block(reading, state, "blocksize")
    nested = None
    if any(role in parts for role in NESTED_ROLES) or "nested_blocksize" in state or "nested_offset" in state:
        absent = [role for role in NESTED_ROLES if role not in parts]
        if absent:
            reading.missing(f"no {', '.join(absent)}")
        size, offset = _block(reading, state, "nested_blocksize"), state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) < 1e30:
            reading.wrong(f"nested_offset {shown(offset)}")
        elif size is not None:
            nested = Nested(size, float(offset))
    return shape, block, nested


def _block(reading: _Reading, state: Mapping[str, Any], key: str) -> int | None:
    """Return a block size of the state, which must be a power of two."""
    value = state.get(key)
    if type(value) is int and 0 < value <= 1 << 20 and value & (value - 1) == 0:
        return value
    reading.wrong(f"{key} {shown(value)} is no power of two")
    return None


def _check_sizes(
    reading: _Reading, shape: tuple[int, ...], block: int, nested: Nested | None, parts: Mapping[str, str]
) -> None:
    """Compare the tensors' dtypes and shapes with what the description demands."""
    view, count = reading.view, math.prod(shape)
    codes, blocks = view[reading.name], -(-count // block)
    width = max(DTYPES[codes.dtype].bits // 8, 1)
    if codes.dtype not in ("U8", "I8", "BF16", "F16", "F32"):
        reading.wrong(f"packed codes of dtype {codes.dtype}")
    elif codes.nbytes != -(-((count + 1) // 2) // width) * width:
        reading.wrong(f"{codes.nbytes} bytes of codes, {(count + 1) // 2} are needed for {list(shape)}")
    elif len(codes.shape) != 2 or codes.shape[1] != 1:
        # the same bytes under the weight's own rows are the other nibble order of a repacked layer
        reading.wrong(f"codes of shape {list(codes.shape)} instead of a column: repacked for one machine's kernel")
    wanted = {"absmax": ("U8" if nested or "nested_absmax" in parts else "F32", blocks), "quant_map": ("F32", 16)}
    if nested is not None:
        wanted |= {"nested_absmax": ("F32", -(-blocks // nested.blocksize)), "nested_quant_map": ("F32", 256)}
    for role, (dtype, size) in wanted.items():
        if role not in parts:
            continue
        record = view[parts[role]]
        if (record.dtype, record.shape) != (dtype, (size,)):
            reading.wrong(f"{role} is {record.dtype}{list(record.shape)}, its description demands {dtype}[{size}]")


# -- one scale a row, block or tensor -----------------------------------------------------------------------------


def by_scale(view: StateView, name: str, record: TensorRecord, parts: dict[str, str]) -> QuantizedWeight | None:
    """Describe an int8 or fp8 weight.

    None where nothing says that this tensor is quantized (a plain fp8 cast has no scale).
    """
    reading, shape = _Reading(view, name), record.shape
    if "SCB" in parts and record.dtype in ("I8", "U8"):
        return _int8(reading, record, {r: n for r, n in parts.items() if r in ("SCB", "weight_format")})
    scale = next((role for role in SCALES if role in parts), None)
    if record.dtype not in (*FLOAT8, "I8") or (scale is None and record.dtype != "I8") or len(shape) < 2:
        return None
    kind = "int8" if record.dtype == "I8" else "fp8"
    if scale is None:
        reading.missing("integer codes without scales")
        return QuantizedWeight(name, kind, shape, {}, problems=tuple(reading.problems))
    zero = next((parts[role] for role in ZEROS if role in parts), None)
    given = {"scale": parts[scale]} | ({"zero_point": zero} if zero else {})
    if zero and (view[zero].elements != view[parts[scale]].elements or DTYPES[view[zero].dtype].numpy is None):
        reading.wrong(f"{zero} {list(view[zero].shape)} does not fit scales {list(view[parts[scale]].shape)}")
    stacked = len(shape) == 3 and view[parts[scale]].shape[:1] == shape[:1] and len(view[parts[scale]].shape) == 3
    block = _scale_block(reading, shape, view[parts[scale]], _told_block(view), stacked)
    return QuantizedWeight(name, kind, shape, given, block, problems=tuple(reading.problems), stacked=stacked)


def _int8(reading: _Reading, record: TensorRecord, parts: dict[str, str]) -> QuantizedWeight:
    """Describe an int8 weight of bitsandbytes."""
    scb = reading.view[parts["SCB"]]
    if record.dtype != "I8" or len(record.shape) != 2:
        reading.wrong(f"codes are {record.dtype}{list(record.shape)}, int8 [rows, columns] is needed")
    elif (scb.dtype, scb.shape) != ("F32", record.shape[:1]):
        reading.wrong(f"SCB is {scb.dtype}{list(scb.shape)}, F32[{record.shape[0]}] is needed")
    if "weight_format" in parts and reading.view[parts["weight_format"]].nbytes:
        order = reading.view.bytes(parts["weight_format"])[0]
        if order != 0:
            reading.wrong(f"weight_format {order}: codes in the order of one GPU's kernel, not by rows")
    columns = record.shape[1] if len(record.shape) == 2 else 1
    return QuantizedWeight(reading.name, "int8", record.shape, parts, (1, columns), problems=tuple(reading.problems))


def _told_block(view: StateView) -> tuple[int, int]:
    """Return the config's `weight_block_size`; DeepSeek's 128 x 128 where it has none."""
    found = (view.config or {}).get("quantization_config")
    sizes = found.get("weight_block_size") if isinstance(found, Mapping) else None
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes):
        return sizes[0], sizes[1]
    return 128, 128


def _scale_block(
    reading: _Reading, shape: tuple[int, ...], scale: TensorRecord, told: tuple[int, int], stacked: bool
) -> tuple[int, int] | None:
    """Find the (rows, columns) that one scale reaches, from the shapes and the block size that the config tells."""
    exponents = scale.dtype in EXPONENTS
    if not exponents and (not DTYPES[scale.dtype].floating or DTYPES[scale.dtype].numpy is None):
        reading.wrong(f"{scale.name} is {scale.dtype}, not a floating number")
        return None
    rows, columns = (shape[-2], shape[-1]) if stacked else (shape[0], math.prod(shape[1:]))
    dims = scale.shape[1:] if stacked else scale.shape
    if scale.elements == 1 and not stacked:
        return rows, columns
    if dims in ((rows,), (rows, 1)):
        return 1, columns
    if len(dims) == 2 and (stacked or len(shape) == 2) and dims[1] and dims[0]:
        down, across = -(-rows // dims[0]), -(-columns // dims[1])
        even = [(down, across), (1, across)] if rows % dims[0] == 0 == columns % dims[1] else []
        for block in (told, *even):
            if (-(-rows // block[0]), -(-columns // block[1])) == dims:
                return block
        reading.wrong(f"{scale.name} {list(scale.shape)} does not divide a weight of {list(shape)}")
    else:
        reading.wrong(f"{scale.name} {list(scale.shape)} does not fit a weight of {list(shape)}")
    return None
