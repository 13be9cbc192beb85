"""Measure whether the codes and the scales of a quantized weight belong together, for Q02 and Q03.

Quantization leaves exact traces: a block's scale is its largest magnitude, and every code is the nearest one. So with
the float weights in hand the codes and scales that should be there are known, up to rounding: a value that another
float dtype on the way could have moved across a code's border is not counted. Scales off and codes right: the scales
are another weight's. Scales right and codes off: the codes were changed after quantization, and where nearly all
went down (bytes) or towards zero (int8), they were averaged and truncated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tensorkeep.conversion.dequantizing import turned
from tensorkeep.conversion.plan import HfTensor
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.stored import QuantizedWeight

Verdict = Literal["sound", "scales", "codes", "averaged", "another"]
_LOOKED_AT = 1 << 20  # elements of one weight whose codes are computed anew, in runs spread over it
_RUNS = 64
# bits -> the least cosine of a block with its reference, and the most that its best scale differs from 1
_FITS = {8: (0.98, 0.05), 6: (0.97, 0.1), 5: (0.95, 0.1), 4: (0.88, 0.25), 3: (0.75, 0.4), 2: (0.4, 0.8), 1: (0.2, 2.0)}
_ROUNDING = 0.009  # of a block's largest magnitude: bf16 in between moves a value and its scale by up to 2^-8 each


@dataclass(frozen=True)
class Match:
    """How a quantized weight compares with the float weight that it should stand for. Shares are between 0 and 1.

    `scales_off` is the share of blocks whose scale is not the reference's, `codes_off` that of codes which rounding
    does not explain, and `fell` the share of those that went down. `fit` is the cosine of the codes and the reference,
    both scaled block by block. `relative` is the error of the weight as it is, `expected` that of a sound quantization:
    Frobenius norms of the difference over that of the reference.
    """

    name: str
    reference: str
    kind: str
    scales_off: float
    codes_off: float
    fell: float
    fit: float
    relative: float
    expected: float

    @property
    def verdict(self) -> Verdict:
        """What is wrong: nothing, the scales, the codes, codes that were averaged, or all (another weight)."""
        scales, codes = self.scales_off <= 0.02, self.codes_off <= 2e-4
        if scales and codes:
            return "sound"
        if codes or (not scales and self.codes_off <= 0.01 and self.fit > 0.9):
            return "scales"
        if not scales:
            return "another"
        return "codes" if self.fit < 0.5 and self.fell < 0.95 else "averaged"

    @property
    def grave(self) -> bool:
        """Whether the weights are wrong beyond quantization; a merge that was quantized again moves scales a little."""
        return self.relative > 1.15 * self.expected + 0.02

    @property
    def figures(self) -> dict[str, Any]:
        """The figures as evidence of a finding."""
        return {
            "scales_off": round(self.scales_off, 4),
            "codes_off": round(self.codes_off, 4),
            "codes_that_fell": round(self.fell, 4),
            "relative_error": round(self.relative, 4),
            "relative_error_of_quantization": round(self.expected, 4),
        }


def weights(case: Case) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of the checkpoint by stored name, found once for all checks."""
    if "quantized" not in case.results:
        case.results["quantized"] = quantized.find_quantized(case.view) if case.view is not None else {}
    found: dict[str, QuantizedWeight] = case.results["quantized"]
    return found


def model_weights(case: Case) -> dict[str, QuantizedWeight]:
    """Return the quantized weights that belong to the model, not to an EMA copy or other state beside it."""
    other = case.identity.other if case.identity is not None else {}
    return {name: weight for name, weight in weights(case).items() if name not in other}


def hf_name(case: Case, weight: QuantizedWeight) -> str:
    """Return the Hugging Face name of a quantized weight, under which the reference has it."""
    names = case.identity.names if case.identity is not None else {}
    owner = next((hub.name for hub in case.tensors.values() if any(p.name == weight.name for p in hub.parts)), None)
    return quantized.float_name(owner or names.get(weight.name, weight.name))


def matches(case: Case) -> dict[str, Match]:
    """Compare quantized weights with the reference, once for all checks.

    Args:
        case: The case.

    Returns:
        The figures by stored name, of each weight whose description is sound and whose float values the reference
        holds (or the same kind of quantization of them); {} without a reference.
    """
    if "quantized matches" not in case.results:
        case.results["quantized matches"] = dict(_matches(case))
    found: dict[str, Match] = case.results["quantized matches"]
    return found


def _matches(case: Case) -> Iterator[tuple[str, Match]]:
    """Yield the figures of each weight that can be compared, by stored name."""
    if case.reference is None or case.view is None:
        return
    theirs = quantized.find_quantized(case.reference)
    owners = {quantized.float_name(h.name): h.parts[0].name for h in case.reference_tensors.values() if h.parts}
    for name, weight in model_weights(case).items():
        reference_name = hf_name(case, weight)
        hub = case.reference_tensors.get(reference_name)
        other = theirs.get(owners.get(reference_name, reference_name))
        if (
            weight.problems
            or not usable(case.view, weight)
            or (other is None and (hub is None or not _float(case.reference, hub)))
        ):
            continue
        if other is not None and (other.problems or other.kind != weight.kind or not usable(case.reference, other)):
            continue  # two roundings of the same weight: neither says what the other's codes must be
        values = (
            quantized.dequantize(case.reference, other.name, other) if other else case.reference_values(reference_name)
        )
        if other is None and turned(case.model_config, reference_name):
            values = values.T
        if values.shape == weight.shape:
            flat = values.astype(np.float32, copy=False).reshape(-1)
            # the reference's own scales were rounded, where they are codes themselves
            slack: Array | float = 0.0
            if other and isinstance(other.block, int):
                slack = _nested_step(case.reference, other, quant_codes.block_maxima(flat, other.block))
            yield name, match(case.view, weight, flat, reference_name, slack)


def _float(view: StateView, hub: HfTensor) -> bool:
    """Say whether a tensor holds float weights: neither eight-bit numbers nor GGUF's blocks."""
    return hub.dtype in ("F64", "F32", "F16", "BF16") and all(view[p.name].encoding == "plain" for p in hub.parts)


def usable(view: StateView, weight: QuantizedWeight) -> bool:
    """Say whether scales and map are numbers to compute with; Q06 reports those that are not."""
    if weight.kind in quant_codes.TABLES:
        table, scales = quantized.four_bit_state(view, weight)
        return bool(np.isfinite(scales).all()) and np.allclose(table, quant_codes.TABLES[weight.kind], atol=1e-6)
    return bool(np.isfinite(quantized.row_scales(view, weight)).all())


def match(
    view: StateView, weight: QuantizedWeight, reference: Array, reference_name: str = "", slack: Array | float = 0.0
) -> Match:
    """Compare one quantized weight with the float weight that it should stand for.

    Args:
        view: The checkpoint.
        weight: The quantized weight in it.
        reference: The float values, of the weight's shape.
        reference_name: Their name, for evidence.
        slack: How far the reference's own scale of each block may be off, where its scales were rounded.
    """
    flat = reference.astype(np.float32, copy=False).reshape(-1)
    if weight.kind in quant_codes.TABLES:
        scales_off, codes_off, fell, fit, expected = _four_bit(view, weight, flat, slack)
    elif "SCB" in weight.parts:
        scales_off, codes_off, fell, fit, expected = _int8(view, weight, flat)
    else:
        scales_off, codes_off, fell, fit, expected = _scaled(view, weight, flat)
    apart = norm = 0.0
    for at, values in quantized.stream_values(view, weight):
        want = flat[at : at + values.size]
        apart, norm = apart + squares(values - want), norm + squares(want)
    relative = float(np.sqrt(apart / max(norm, 1e-300)))
    return Match(
        weight.name, reference_name or weight.name, weight.kind, scales_off, codes_off, fell, fit, relative, expected
    )


def squares(values: Array) -> float:
    """Return the sum of squares of a piece; single precision is enough for figures that people read."""
    return float(np.dot(values, values))


Figures = tuple[float, float, float, float, float]  # scales_off, codes_off, fell, fit and expected of a Match


def _four_bit(view: StateView, weight: QuantizedWeight, flat: Array, slack: Array | float) -> Figures:
    """Compare nf4 or fp4 codes and their scales with the values in `flat`."""
    assert isinstance(weight.block, int)
    table, scales = quantized.four_bit_state(view, weight)
    true = quant_codes.block_maxima(flat, weight.block)
    packed = quantized.packed_bytes(view, weight)
    wrong = fell = looked = moved = 0
    dots = np.zeros(3)
    for at, end in _runs(flat.size, 2 * weight.block):
        some, blocks = flat[at:end], slice(at // weight.block, -(-end // weight.block))
        got = quant_codes.nibbles(packed[at // 2 : (end + 1) // 2], end - at)
        best, margin = quant_codes.nearest_codes(some, true[blocks], weight.block, table)
        off = (table[best] != table[got]) & (margin > _ROUNDING)
        now, then = (quant_codes.pack_nibbles(c).astype(np.int16) for c in (got, np.where(off, best, got)))
        wrong, looked = wrong + int(off.sum()), looked + off.size
        moved, fell = moved + int((now != then).sum()), fell + int((now < then).sum())
        dots += _dots(quant_codes.scaled(table[got], true[blocks], weight.block), some)
        dots[2] += float(np.square(quant_codes.scaled(table[best], true[blocks], weight.block) - some).sum())
    off_scales = np.abs(scales - true) > _ROUNDING * true + _nested_step(view, weight, true) + slack
    return (*_shares(off_scales, wrong, looked, fell, moved), *_fit(dots, flat, 2 * weight.block))


def _nested_step(view: StateView, weight: QuantizedWeight, true: Array) -> Array | float:
    """Return how far double quantization may move a scale: the gap between its two nearest 8-bit levels."""
    if weight.nested is None:
        return 0.0
    levels = np.sort(view.array(weight.parts["nested_quant_map"]))
    outer = np.repeat(view.array(weight.parts["nested_absmax"]), weight.nested.blocksize)[: true.size]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.searchsorted(levels, np.where(outer > 0, (true - np.float32(weight.nested.offset)) / outer, 0))
    gap = levels[np.clip(at, 0, levels.size - 1)] - levels[np.clip(at - 1, 0, levels.size - 1)]
    return np.asarray(gap * outer)


def _int8(view: StateView, weight: QuantizedWeight, flat: Array) -> Figures:
    """Compare bitsandbytes' int8 codes and row scales with the values in `flat`."""
    assert weight.shape is not None
    rows, columns = weight.shape
    scales, true = quantized.row_scales(view, weight)[:, 0], np.zeros(rows, np.float32)
    wrong = fell = 0
    dots = np.zeros(3)
    step = max(quant_codes.ELEMENTS_AT_ONCE // max(columns, 1), 1)
    for at in range(0, rows, step):
        some = flat.reshape(rows, columns)[at : at + step]
        top = true[at : at + step] = np.abs(some).max(axis=1, initial=0)
        raw = b"".join(bytes(p) for p in view.stream(weight.name, (at, at + len(some))))
        got = np.frombuffer(raw, np.int8).reshape(some.shape).astype(np.float32)
        wanted = some * np.where(top > 0, 127 / np.where(top > 0, top, 1), 0)[:, None]
        off = np.abs(wanted - got) > 0.55 + _ROUNDING * np.abs(wanted)
        wrong, fell = wrong + int(off.sum()), fell + int((np.abs(got) < np.abs(wanted))[off].sum())
        dots += _dots((got * top[:, None]).reshape(-1), some.reshape(-1))
        dots[2] += squares(((np.rint(wanted) - wanted) * top[:, None] / 127).reshape(-1))
    return (*_shares(np.abs(scales - true) > 0.01 * true, wrong, flat.size, fell, wrong), *_whole_fit(dots, flat))


def _scaled(view: StateView, weight: QuantizedWeight, flat: Array) -> Figures:
    """Compare other kinds: writers choose scales and codes differently, so the best scale is fitted block by block."""
    assert isinstance(weight.block, tuple)
    rows, columns = weight.matrix
    made, want = quantized.dequantize(view, weight.name, weight).reshape(rows, columns), flat.reshape(rows, columns)
    down, across = (np.arange(0, n, b) for n, b in ((rows, weight.block[0]), (columns, weight.block[1])))
    sums = [np.add.reduceat(np.add.reduceat(a, down, 0), across, 1) for a in (made * want, made * made, want * want)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, fit = sums[0] / sums[1], sums[0] / np.sqrt(sums[1] * sums[2])
    known = np.isfinite(ratio) & np.isfinite(fit)
    by_row = np.repeat(np.where(known, ratio, 1), weight.block[0], 0)[:rows]
    best = want - made * np.repeat(by_row, weight.block[1], 1)[:, :columns]
    least, most = _FITS.get(weight.bits or 8, _FITS[4])
    strange = known & (fit < least)
    off = known & ~strange & (np.abs(ratio - 1) > most)
    dots = np.array([float((made * want).sum()), float((made * made).sum()), float(np.square(best).sum())])
    return (*_shares(off | strange, int(strange.sum()), max(int(known.sum()), 1), 0, 0), *_whole_fit(dots, flat))


def _runs(count: int, unit: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements to look at: all of a small weight, runs of whole units spread over a large one."""
    if count <= _LOOKED_AT:
        yield 0, count
        return
    length = max(_LOOKED_AT // _RUNS // unit, 1) * unit
    for i in range(_RUNS):
        start = (count - length) * i // (_RUNS - 1) // unit * unit
        yield start, min(start + length, count)


def _dots(made: Array, want: Array) -> Array:
    """Return the products made · want and made · made, and room for the squared error of a sound quantization."""
    return np.array([float(np.dot(made, want)), float(np.dot(made, made)), 0.0])


def _shares(scales: Array, wrong: int, looked: int, fell: int, moved: int) -> tuple[float, float, float]:
    """Turn counts into scales_off, codes_off and fell."""
    return float(scales.mean()) if scales.size else 0.0, wrong / max(looked, 1), fell / max(moved, 1)


def _fit(dots: Array, flat: Array, unit: int) -> tuple[float, float]:
    """Return the cosine of codes and reference and the error of a sound quantization, over the ranges looked at."""
    return _ratios(dots, sum(squares(flat[a:b]) for a, b in _runs(flat.size, unit)))


def _whole_fit(dots: Array, flat: Array) -> tuple[float, float]:
    """Return what `_fit` does, where every element was looked at."""
    return _ratios(dots, sum(squares(flat[at : at + _LOOKED_AT]) for at in range(0, flat.size, _LOOKED_AT)))


def _ratios(dots: Array, norm: float) -> tuple[float, float]:
    """Divide the sums of `_dots` by the squared norm of the reference."""
    if norm == 0 or dots[1] == 0:
        return (1.0 if norm == dots[1] else 0.0), 0.0
    return float(dots[0] / np.sqrt(dots[1] * norm)), float(np.sqrt(dots[2] / norm))


# -- without a reference ----------------------------------------------------------------------------------------------


def averaged_blocks(view: StateView, weight: QuantizedWeight) -> tuple[int, int]:
    """Count the 4-bit blocks that have no full-scale code, which quantization gives the largest element of each.

    Args:
        view: The checkpoint.
        weight: A quantized weight in it.

    Returns:
        The number of such blocks and of all blocks looked at; (0, 0) for anything but nf4 and fp4.
    """
    if weight.kind not in quant_codes.TABLES or not isinstance(weight.block, int):
        return 0, 0
    table = view.array(weight.parts["quant_map"])
    packed, lost, looked = quantized.packed_bytes(view, weight), 0, 0
    for at, end in _runs(weight.elements, 2 * weight.block):
        bits = quant_codes.nibbles(packed[at // 2 : (end + 1) // 2], end - at)
        lost += quant_codes.full_scale_missing(bits, table, weight.block)
        looked += -(-(end - at) // weight.block)
    return lost, looked
