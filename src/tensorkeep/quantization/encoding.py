"""Float weights to codes and back, as bitsandbytes does it: what a weight becomes when it is quantized (again).

Everything is float32 with one rounding an operation, in bitsandbytes' order: a 4-bit code is the nearest level of the
table after multiplication by 1/absmax (division in the last block, where it is cut), a value on the border takes the
lower level. Double quantization stores absmax - mean(absmax) in the 8-bit dynamic map (Dettmers et al., arXiv
2110.02861), blocks of 256. Codes are chosen with the float absmax, before it is rounded itself.

Where bitsandbytes' result depends on the machine, this is the one of its CPU code on one thread: the mean (torch sums
float32 in an order of its own, GPUs in another: an ulp or two of the offset) and the 8-bit codes of the scales.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from tensorkeep.errors import TensorkeepError
from tensorkeep.quantization.codes import NESTED_BLOCK, PER_127, SMALLEST, TABLES, Array, scaled

LEVELS = {kind: table + np.float32(0) for kind, table in TABLES.items()}  # FP4's second zero is +0 in the files, too


class Encoding(NamedTuple):
    """How weights are quantized: nf4 or fp4 in blocks of `block` flat elements, scales perhaps quantized; or int8 by row."""

    kind: str
    block: int = 64
    double: bool = False

    @property
    def spoken(self) -> str:
        """For people: `nf4 (double)`."""
        return f"{self.kind} (double)" if self.double else self.kind


class Forms(NamedTuple):
    """How a model's linears are quantized: the usual way (None: not at all), and those layers that differ, by name."""

    usual: Encoding | None
    layers: tuple[tuple[str, Encoding | None], ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[Encoding]:
        return [k for k in dict.fromkeys([self.usual, *(k for _, k in self.layers)]) if k is not None]


def forms_of(document: object, where: object) -> Forms:
    """`Forms` out of an adapter config's `quantization`. Raises TensorkeepError where it names none of ours.

    >>> forms_of({"kind": "nf4", "block": 64, "double": True, "layers": {"a": None}}, "x").kinds[0].spoken
    'nf4 (double)'
    """
    given = document if isinstance(document, dict) else {"kind": document}
    layers, modules = given.get("layers") or {}, given.get("modules") or []
    if not isinstance(layers, dict) or not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise TensorkeepError(
            f"its quantization is {document!r:.120}", where=where, code="A02", hint="take the config as it was saved"
        )
    odd = tuple(sorted((str(n), None if form is None else _kind_of(form, where)) for n, form in layers.items()))
    usual = None if given.get("kind") is None and layers else _kind_of(given, where)
    return Forms(usual, odd, tuple(modules))


def _kind_of(document: object, where: object) -> Encoding:
    given = document if isinstance(document, dict) else {}
    made = Encoding(str(given.get("kind")), given.get("block", 64), given.get("double", False))
    sound = type(made.block) is int and 0 < made.block <= 1 << 16 and made.block & (made.block - 1) == 0
    if made.kind not in (*TABLES, "int8") or not sound or type(made.double) is not bool:
        raise TensorkeepError(
            f"its quantization is {document!r:.120}",
            where=where,
            code="A02",
            hint='expected {"kind": "nf4", "fp4" or "int8", "block": a power of two, "double": true or false}',
        )
    return made


def linspace(low: float, high: float, count: int) -> Array:
    """torch.linspace in float32: fused multiply-add, steps from the nearer end."""
    step = (np.float32(high) - np.float32(low)) / np.float32(count - 1)
    far = np.arange(count) * np.float64(step)  # exact in float64, so each sum is rounded once, as a fused one is
    up, down = np.float64(np.float32(low)) + far, np.float64(np.float32(high)) - far[::-1]
    return np.where(np.arange(count) < count // 2, up, down).astype(np.float32)


def dynamic_map() -> Array:
    """The signed 8-bit dynamic map: seven decades, each with twice the levels of the one below.

    >>> dynamic_map().shape, float(dynamic_map()[-1])
    ((256,), 1.0)
    """
    levels: list[Array] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        borders = linspace(0.1, 1, 2**i + 1)
        means = np.float32(10.0 ** (i - 6)) * ((borders[:-1] + borders[1:]) / np.float32(2))
        levels += [means, -means]
    return np.sort(np.concatenate(levels))


def absolute_maxima(flat: Array, block: int) -> Array:
    """The scale of every block of flat float32 values; a cut last block of zeros gets 1e-38, as bitsandbytes has it."""
    whole = flat.size // block
    top = np.abs(flat[: whole * block]).reshape(whole, block).max(1, initial=0)
    if whole * block < flat.size:
        top = np.append(top, np.maximum(np.abs(flat[whole * block :]).max(), SMALLEST))
    return np.asarray(top, np.float32)


def _unit_values(flat: Array, absmax: Array, block: int) -> Array:
    """Values relative to the scale of their block, within [-1, 1]."""
    whole = flat.size // block
    unit = scaled(flat[: whole * block], np.float32(1) / np.maximum(absmax[:whole], SMALLEST), block)
    if whole * block < flat.size:
        unit = np.append(unit, flat[whole * block :] / absmax[whole])
    return np.clip(unit, -1, 1, out=unit)


def four_bit_codes(flat: Array, absmax: Array, kind: str, block: int) -> Array:
    """The 4-bit code of every flat float32 value.

    >>> four_bit_codes(np.array([-2, 0, 1.99], np.float32), np.array([2], np.float32), "nf4", 64).tolist()
    [0, 7, 15]
    """
    table = LEVELS[kind]
    order = np.argsort(table, kind="stable")
    levels = table[order]
    at = np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), _unit_values(flat, absmax, block), side="left")
    return np.asarray(order[at], np.uint8)


def mean(values: Array) -> np.float32:
    """The float32 mean as torch's CPU kernel sums it: four rows of eight lanes, in a cascade of four levels.

    The order is that of torch's SumKernel.cpp for eight lanes, which it uses on AVX-512 machines too.
    """
    if values.size < 8:  # no vector at all: four sums, the rest to the first of them
        first, *others = values[: values.size // 4 * 4] if values.size > 3 else (np.float32(0),)
        for value in (*values[values.size // 4 * 4 :], *others):
            first = np.float32(first + value)
        return np.float32(first / np.float32(values.size))
    lanes = values[: values.size // 8 * 8].reshape(-1, 8)
    rows = lanes[: len(lanes) // 4 * 4].reshape(-1, 4, 8)
    power = max(4, max(len(rows) - 1, 0).bit_length() // 4)
    step = 1 << power
    sums, at = np.zeros((4, 4, 8), np.float32), 0
    while at + step <= len(rows):
        for row in rows[at : at + step]:
            sums[0] += row
        at += step
        for level in range(1, 4):
            sums[level] += sums[level - 1]
            sums[level - 1] = 0
            if at & ((step - 1) << (level * power)):
                break
    for row in rows[at:]:
        sums[0] += row
    for level in range(1, 4):
        sums[0] += sums[level]
    total = sums[0]
    for row in lanes[len(rows) * 4 :]:
        total[0] += row
    for other in total[1:]:
        total[0] += other
    single = np.float32(0)
    for value in (*values[lanes.size :], *total[0]):
        single = np.float32(single + value)
    return np.float32(single / np.float32(values.size))


def nested(absmax: Array, offset: np.float32 | None = None) -> tuple[Array, Array, np.float32]:
    """Scales as 8-bit codes, the scale of every 256 of them, and the offset (their mean unless given).

    bitsandbytes' CPU kernel looks the nearest level up in a table of 65,536 equal steps, which is not always the
    nearest: measured on 0.50.2, equal for 4.5 million values. Its GPU kernel takes the nearest.
    """
    offset = mean(absmax) if offset is None else offset
    rest = absmax - offset
    outer = np.maximum.reduceat(np.abs(rest), np.arange(0, rest.size, NESTED_BLOCK)).astype(np.float32)
    spread = np.repeat(outer, NESTED_BLOCK)[: rest.size]
    unit = np.divide(rest, spread, out=np.full_like(rest, -1), where=spread > 0)  # 0/0 becomes the first code
    return (
        _nearest_steps()[((unit + np.float32(1)) * np.float32(32767.5) + np.float32(0.5)).astype(np.int32)],
        outer,
        offset,
    )


@cache
def _nearest_steps() -> Array:
    levels = dynamic_map()
    steps = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    return np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), steps).astype(np.uint8)


def stored_scales(absmax: Array, double: bool) -> Array:
    """The scales as a reader of the file gets them: themselves, or through double quantization."""
    if not double:
        return absmax
    codes, outer, offset = nested(absmax)
    return np.asarray(scaled(dynamic_map()[codes], outer, NESTED_BLOCK) + offset, np.float32)


def int8_values(rows: Array) -> Array:
    """Rows [n, K] through int8, which starts from float16: code = round(w · (127 · (1 / max|w|))), value = code · max|w| / 127."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        half = rows.astype(np.float16).astype(np.float32)
        top = np.abs(half).max(1, initial=0)
        codes = np.rint(half * np.where(top > 0, np.float32(127) * (np.float32(1) / top), np.float32(0))[:, None])
    return np.asarray((codes + np.float32(0)) * top[:, None] * PER_127, np.float32)  # an integer has no -0


def through(values: Array, kind: Encoding) -> Array:
    """float32 values [N, K] quantized and dequantized again.

    >>> float(np.abs(through(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), Kind("nf4"))).max())
    1.0
    """
    if kind.kind == "int8":
        return int8_values(values.reshape(values.shape[0], -1)).reshape(values.shape)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    absmax = absolute_maxima(flat, kind.block)
    codes = four_bit_codes(flat, absmax, kind.kind, kind.block)
    return scaled(LEVELS[kind.kind][codes], stored_scales(absmax, kind.double), kind.block).reshape(values.shape)
