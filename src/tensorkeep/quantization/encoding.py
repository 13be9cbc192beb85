"""Turn float weights into codes and back in numpy, as bitsandbytes does: what a weight becomes when it is quantized.

Everything is float32 with one rounding per operation, in bitsandbytes' order: a 4-bit code is the nearest level of the
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
from tensorkeep.quantization.codes import NESTED_BLOCK, PER_127, SMALLEST_SCALE, TABLES, Array, scaled

LEVELS = {kind: table + np.float32(0) for kind, table in TABLES.items()}  # FP4's second zero is +0 in the files, too

# modules that stay floats where nobody says otherwise: heads, by the end of their names, and embeddings
HEADS = ("lm_head$", "head$", "embed_out$", "output$", "score$", "classifier$")
EXCLUDED = (*HEADS, "*embed*")


class Encoding(NamedTuple):
    """How a weight is quantized.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        block: number of flat elements that share a scale (nf4, fp4); int8 has one scale per row.
        double: whether the scales are quantized as well (nf4, fp4).
    """

    kind: str
    block: int = 64
    double: bool = False

    @property
    def spoken(self) -> str:
        """How people say it: `nf4 (double)`."""
        return f"{self.kind} (double)" if self.double else self.kind


class Forms(NamedTuple):
    """How the linears of a model are quantized.

    Attributes:
        usual: how most of them are; None where they are not quantized.
        layers: the linears that differ, as (name, how).
        modules: patterns of the linears that the usual way is for; empty for all but heads and embeddings.
    """

    usual: Encoding | None
    layers: tuple[tuple[str, Encoding | None], ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[Encoding]:
        """The different encodings that occur."""
        return [k for k in dict.fromkeys([self.usual, *(k for _, k in self.layers)]) if k is not None]


def forms_of(document: object, where: object) -> Forms:
    """Read how a base model was quantized from an adapter config's `quantization`.

    Args:
        document: the value of that key.
        where: the config, for messages.

    Returns:
        How the layers were quantized: the usual way, and the layers that differ.

    Raises:
        TensorkeepError: A02 where it is none that is known here.

    Example:
        >>> forms_of({"kind": "nf4", "block": 64, "double": True, "layers": {"a": None}}, "x").kinds[0].spoken
        'nf4 (double)'
    """
    given = document if isinstance(document, dict) else {"kind": document}
    layers, modules = given.get("layers") or {}, given.get("modules") or []
    if not isinstance(layers, dict) or not isinstance(modules, list) or not all(isinstance(m, str) for m in modules):
        raise TensorkeepError(
            f"its quantization is {document!r:.120}", where=where, code="A02", hint="take the config as it was saved"
        )
    odd = tuple(sorted((str(n), None if form is None else _encoding_of(form, where)) for n, form in layers.items()))
    usual = None if given.get("kind") is None and layers else _encoding_of(given, where)
    return Forms(usual, odd, tuple(modules))


def _encoding_of(document: object, where: object) -> Encoding:
    """Read one encoding of the document; A02 where it is none."""
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
    """Compute torch.linspace in float32: fused multiply-add, steps from the nearer end."""
    step = (np.float32(high) - np.float32(low)) / np.float32(count - 1)
    far = np.arange(count) * np.float64(step)  # exact in float64, so each sum is rounded once, as a fused one is
    up, down = np.float64(np.float32(low)) + far, np.float64(np.float32(high)) - far[::-1]
    return np.where(np.arange(count) < count // 2, up, down).astype(np.float32)


def dynamic_map() -> Array:
    """Return the signed 8-bit dynamic map: seven decades, each with twice the levels of the one below.

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
    """Return the scale of every block of flat values.

    Args:
        flat: float32 [n].
        block: number of values per block; the last block may be shorter.

    Returns:
        float32 [ceil(n / block)]; a shorter last block of zeros gets 1e-38, as bitsandbytes has it.
    """
    whole = flat.size // block
    top = np.abs(flat[: whole * block]).reshape(whole, block).max(1, initial=0)
    if whole * block < flat.size:
        top = np.append(top, np.maximum(np.abs(flat[whole * block :]).max(), SMALLEST_SCALE))
    return np.asarray(top, np.float32)


def _unit_values(flat: Array, absmax: Array, block: int) -> Array:
    """Divide values by the scale of their block; the results lie within [-1, 1]."""
    whole = flat.size // block
    unit = scaled(flat[: whole * block], np.float32(1) / np.maximum(absmax[:whole], SMALLEST_SCALE), block)
    if whole * block < flat.size:
        unit = np.append(unit, flat[whole * block :] / absmax[whole])
    return np.clip(unit, -1, 1, out=unit)


def four_bit_codes(flat: Array, absmax: Array, kind: str, block: int) -> Array:
    """Find the 4-bit code of every value.

    Args:
        flat: float32 [n].
        absmax: the scales, float32 [ceil(n / block)].
        kind: "nf4" or "fp4".
        block: number of values that share a scale.

    Returns:
        uint8 [n].

    Example:
        >>> four_bit_codes(np.array([-2, 0, 1.99], np.float32), np.array([2], np.float32), "nf4", 64).tolist()
        [0, 7, 15]
    """
    table = LEVELS[kind]
    order = np.argsort(table, kind="stable")
    levels = table[order]
    at = np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), _unit_values(flat, absmax, block), side="left")
    return np.asarray(order[at], np.uint8)


def mean(values: Array) -> np.float32:
    """Compute the float32 mean as torch's CPU kernel sums it: four rows of eight lanes, in a cascade of four levels.

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
    """Quantize scales to 8-bit codes; return codes, the scale of every 256 of them, and the offset.

    The offset is the scales' mean unless it is given. bitsandbytes' CPU kernel looks the nearest level up in a table of
    65,536 equal steps, which is not always the nearest: measured on 0.50.2, equal for 4.5 million values. Its GPU
    kernel takes the nearest.
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
    """Make the table of 65,536 steps of [-1, 1] with the code of the level nearest to each."""
    levels = dynamic_map()
    steps = np.arange(65536, dtype=np.float32) / np.float32(65535) * np.float32(2) - np.float32(1)
    return np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), steps).astype(np.uint8)


def stored_scales(absmax: Array, double: bool) -> Array:
    """Return the scales as a reader of the file gets them.

    Args:
        absmax: the scales, float32 [blocks].
        double: whether they are stored through double quantization, which rounds them.

    Returns:
        float32 [blocks].
    """
    if not double:
        return absmax
    codes, outer, offset = nested(absmax)
    return np.asarray(scaled(dynamic_map()[codes], outer, NESTED_BLOCK) + offset, np.float32)


def int8_values(rows: Array) -> Array:
    """Send rows through int8 and back: each row by its largest magnitude.

    The way starts from float16, as in bitsandbytes:
    code = round(w · (127 · (1 / max|w|))), value = code · max|w| / 127.

    Args:
        rows: float32 [n, columns].

    Returns:
        float32 [n, columns].
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        half = rows.astype(np.float16).astype(np.float32)
        top = np.abs(half).max(1, initial=0)
        codes = np.rint(half * np.where(top > 0, np.float32(127) * (np.float32(1) / top), np.float32(0))[:, None])
    return np.asarray((codes + np.float32(0)) * top[:, None] * PER_127, np.float32)  # an integer has no -0


def through(values: Array, encoding: Encoding) -> Array:
    """Quantize values and dequantize them again.

    >>> float(np.abs(through(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), Encoding("nf4"))).max())
    1.0
    """
    if encoding.kind == "int8":
        return int8_values(values.reshape(values.shape[0], -1)).reshape(values.shape)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    absmax = absolute_maxima(flat, encoding.block)
    codes = four_bit_codes(flat, absmax, encoding.kind, encoding.block)
    return scaled(LEVELS[encoding.kind][codes], stored_scales(absmax, encoding.double), encoding.block).reshape(
        values.shape
    )
