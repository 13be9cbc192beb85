"""Do the codes, the scales and the reference of a quantized weight belong together? Figures for Q02 and Q03.

Quantization leaves exact traces: a block's scale is its largest magnitude, and every code is the nearest one. So with
the float weights in hand the codes and scales that should be there are known, up to rounding: a value that another
float dtype on the way could have moved across a code's border is not counted. Scales off and codes right: the scales
are another weight's. Scales right and codes off: the codes were changed after quantization, and where nearly all
went down (bytes) or towards zero (int8), they were averaged and truncated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tensorkeep.conversion.plan import HfTensor
from tensorkeep.conversion.proof import read_certificate, stored_name
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.stored import QuantizedWeight

Verdict = Literal["sound", "scales", "codes", "averaged", "another"]
LOOKED_AT = 1 << 20  # elements of one weight whose codes are computed anew, in runs spread over it
_RUNS = 64
ROUNDING = 0.009  # of a block's largest magnitude: bf16 in between moves a value and its scale by up to 2^-8 each
RECORD = "tensorkeep.quantised"  # safetensors metadata, spelled as files have it: {codes' name: {"codes": xxh3_128, "state": xxh3_128}}


@dataclass(frozen=True)
class Match:
    """A quantized weight beside its reference. Shares are of 1; `relative` and `expected` are Frobenius errors.

    `scales_off`: blocks whose scale is not the reference's. `codes_off`: codes that rounding does not explain, `fell`:
    how many of those went down. `fit`: cosine between codes and reference, block by block scaled.
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
        return {
            "scales_off": round(self.scales_off, 4),
            "codes_off": round(self.codes_off, 4),
            "codes_that_fell": round(self.fell, 4),
            "relative_error": round(self.relative, 4),
            "relative_error_of_quantization": round(self.expected, 4),
        }


def weights(case: Case) -> dict[str, QuantizedWeight]:
    """The quantized weights of the checkpoint, found once."""
    if "quantized" not in case.orders:
        case.orders["quantized"] = quantized.find_quantized(case.view) if case.view is not None else {}
    found: dict[str, QuantizedWeight] = case.orders["quantized"]
    return found


def model_weights(case: Case) -> dict[str, QuantizedWeight]:
    """Those that belong to the model, not to an EMA copy or other state beside it."""
    other = case.identity.other if case.identity is not None else {}
    return {name: weight for name, weight in weights(case).items() if name not in other}


def hf_name(case: Case, weight: QuantizedWeight) -> str:
    """The name of a quantized weight's tensor in the reference."""
    names = case.identity.names if case.identity is not None else {}
    owner = next((hub.name for hub in case.tensors.values() if any(p.name == weight.name for p in hub.parts)), None)
    clean = owner or names.get(weight.name, weight.name)
    return clean.removesuffix(quantized.TORCHAO) + ".weight" if clean.endswith(quantized.TORCHAO) else clean


def matches(case: Case) -> dict[str, Match]:
    """Every sound description whose float weights (or equally quantized ones) the reference holds, measured once."""
    if "quantized matches" not in case.orders:
        case.orders["quantized matches"] = dict(_matches(case))
    found: dict[str, Match] = case.orders["quantized matches"]
    return found


def _matches(case: Case) -> Iterator[tuple[str, Match]]:
    if case.reference is None or case.view is None:
        return
    theirs = quantized.find_quantized(case.reference)
    owners = {hub.name: hub.parts[0].name for hub in case.reference_tensors.values() if hub.parts}
    for name, weight in model_weights(case).items():
        target = hf_name(case, weight)
        hub = case.reference_tensors.get(target)
        other = theirs.get(owners.get(target, target))
        if (
            weight.problems
            or not usable(case.view, weight)
            or (other is None and (hub is None or not _float(case.reference, hub)))
        ):
            continue
        if other is not None and (other.problems or other.kind != weight.kind or not usable(case.reference, other)):
            continue  # two roundings of the same weight: neither says what the other's codes must be
        values = quantized.dequantize(case.reference, other.name, other) if other else case.reference_values(target)
        if values.shape == weight.shape:
            flat = values.astype(np.float32, copy=False).reshape(-1)
            # the reference's own scales were rounded, where they are codes themselves
            slack = (
                _nested_step(case.reference, other, quant_codes.block_maxima(flat, other.block))
                if other and isinstance(other.block, int)
                else 0.0
            )
            yield name, compare(case.view, weight, flat, target, slack)


def _float(view: StateView, hub: HfTensor) -> bool:
    """Whether a tensor holds the weights themselves: stored as floats, and neither in eight bits nor in GGUF's blocks."""
    return hub.dtype in ("F64", "F32", "F16", "BF16") and all(view[p.name].encoding == "plain" for p in hub.parts)


def usable(view: StateView, weight: QuantizedWeight) -> bool:
    """Whether scales and map are numbers to compute with (Q06 says it otherwise)."""
    if weight.kind in quant_codes.TABLES:
        table, scales = quantized.four_bit_state(view, weight)
        return bool(np.isfinite(scales).all()) and np.allclose(table, quant_codes.TABLES[weight.kind], atol=1e-6)
    return bool(np.isfinite(quantized.row_scales(view, weight)).all())


def compare(
    view: StateView, weight: QuantizedWeight, reference: Array, target: str = "", slack: Array | float = 0.0
) -> Match:
    """Measure one quantized weight against the float weight that it should stand for, of the same shape.

    `slack`: by how much the reference may miss the true scale of each block.
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
    return Match(weight.name, target or weight.name, weight.kind, scales_off, codes_off, fell, fit, relative, expected)


def squares(values: Array) -> float:
    """The sum of squares of a piece; single precision within it is enough for figures that people read."""
    return float(np.dot(values, values))


Figures = tuple[float, float, float, float, float]


def _four_bit(view: StateView, weight: QuantizedWeight, flat: Array, slack: Array | float) -> Figures:
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
        off = (table[best] != table[got]) & (margin > ROUNDING)
        now, then = (quant_codes.pack_nibbles(c).astype(np.int16) for c in (got, np.where(off, best, got)))
        wrong, looked = wrong + int(off.sum()), looked + off.size
        moved, fell = moved + int((now != then).sum()), fell + int((now < then).sum())
        dots += _dots(quant_codes.scaled(table[got], true[blocks], weight.block), some)
        dots[2] += float(np.square(quant_codes.scaled(table[best], true[blocks], weight.block) - some).sum())
    off_scales = np.abs(scales - true) > ROUNDING * true + _nested_step(view, weight, true) + slack
    return (*_shares(off_scales, wrong, looked, fell, moved), *_fit(dots, flat, 2 * weight.block))


def _nested_step(view: StateView, weight: QuantizedWeight, true: Array) -> Array | float:
    """How far double quantization may move a scale: the gap between its two nearest 8-bit levels."""
    if weight.nested is None:
        return 0.0
    levels = np.sort(view.array(weight.parts["nested_quant_map"]))
    outer = np.repeat(view.array(weight.parts["nested_absmax"]), weight.nested.blocksize)[: true.size]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.searchsorted(levels, np.where(outer > 0, (true - np.float32(weight.nested.offset)) / outer, 0))
    gap = levels[np.clip(at, 0, levels.size - 1)] - levels[np.clip(at - 1, 0, levels.size - 1)]
    return np.asarray(gap * outer)


def _int8(view: StateView, weight: QuantizedWeight, flat: Array) -> Figures:
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
        off = np.abs(wanted - got) > 0.55 + ROUNDING * np.abs(wanted)
        wrong, fell = wrong + int(off.sum()), fell + int((np.abs(got) < np.abs(wanted))[off].sum())
        dots += _dots((got * top[:, None]).reshape(-1), some.reshape(-1))
        dots[2] += squares(((np.rint(wanted) - wanted) * top[:, None] / 127).reshape(-1))
    return (*_shares(np.abs(scales - true) > 0.01 * true, wrong, flat.size, fell, wrong), *_whole_fit(dots, flat))


def _scaled(view: StateView, weight: QuantizedWeight, flat: Array) -> Figures:
    """fp8 and other int8: how the scale was chosen differs between writers, so the best one is fitted, block by block."""
    assert weight.shape is not None and isinstance(weight.block, tuple)
    rows, columns = weight.shape[0], int(np.prod(weight.shape[1:]))
    made, want = quantized.dequantize(view, weight.name, weight).reshape(rows, columns), flat.reshape(rows, columns)
    down, across = (np.arange(0, n, b) for n, b in ((rows, weight.block[0]), (columns, weight.block[1])))
    sums = [np.add.reduceat(np.add.reduceat(a, down, 0), across, 1) for a in (made * want, made * made, want * want)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, fit = sums[0] / sums[1], sums[0] / np.sqrt(sums[1] * sums[2])
    known = np.isfinite(ratio) & np.isfinite(fit)
    best = (
        want
        - made
        * np.repeat(np.repeat(np.where(known, ratio, 1), weight.block[0], 0)[:rows], weight.block[1], 1)[:, :columns]
    )
    strange = known & (fit < 0.98)
    off = known & ~strange & (np.abs(ratio - 1) > 0.05)
    dots = np.array([float((made * want).sum()), float((made * made).sum()), float(np.square(best).sum())])
    return (*_shares(off | strange, int(strange.sum()), max(int(known.sum()), 1), 0, 0), *_whole_fit(dots, flat))


def _runs(count: int, unit: int) -> Iterator[tuple[int, int]]:
    """All of a small weight; RUNS runs of whole units spread over a large one."""
    if count <= LOOKED_AT:
        yield 0, count
        return
    length = max(LOOKED_AT // _RUNS // unit, 1) * unit
    for i in range(_RUNS):
        start = (count - length) * i // (_RUNS - 1) // unit * unit
        yield start, min(start + length, count)


def _dots(made: Array, want: Array) -> Array:
    return np.array([float(np.dot(made, want)), float(np.dot(made, made)), 0.0])


def _shares(scales: Array, wrong: int, looked: int, fell: int, moved: int) -> tuple[float, float, float]:
    return float(scales.mean()) if scales.size else 0.0, wrong / max(looked, 1), fell / max(moved, 1)


def _fit(dots: Array, flat: Array, unit: int) -> tuple[float, float]:
    """Cosine of codes and reference, and the relative error of a sound quantization, both over what was looked at."""
    return _ratios(dots, sum(squares(flat[a:b]) for a, b in _runs(flat.size, unit)))


def _whole_fit(dots: Array, flat: Array) -> tuple[float, float]:
    """The same where everything was looked at."""
    return _ratios(dots, sum(squares(flat[at : at + LOOKED_AT]) for at in range(0, flat.size, LOOKED_AT)))


def _ratios(dots: Array, norm: float) -> tuple[float, float]:
    if norm == 0 or dots[1] == 0:
        return (1.0 if norm == dots[1] else 0.0), 0.0
    return float(dots[0] / np.sqrt(dots[1] * norm)), float(np.sqrt(dots[2] / norm))


# -- without a reference ------------------------------------------------------------------------------------------------


def averaged_blocks(view: StateView, weight: QuantizedWeight) -> tuple[int, int]:
    """Blocks (of those looked at) that lost their full-scale code, and how many were looked at (nf4 and fp4 only)."""
    if weight.kind not in quant_codes.TABLES or not isinstance(weight.block, int):
        return 0, 0
    table = view.array(weight.parts["quant_map"])
    packed, lost, looked = quantized.packed_bytes(view, weight), 0, 0
    for at, end in _runs(weight.elements, 2 * weight.block):
        bits = quant_codes.nibbles(packed[at // 2 : (end + 1) // 2], end - at)
        lost += quant_codes.full_scale_missing(bits, table, weight.block)
        looked += -(-(end - at) // weight.block)
    return lost, looked


def digests(view: StateView, weight: QuantizedWeight) -> dict[str, str]:
    """Digests of a weight's codes and of its state (name by role), by which a writer ties them together."""
    import xxhash

    state = xxhash.xxh3_128()
    for role in sorted(weight.parts):
        state.update(f"{role} {view.digest(weight.parts[role])}\n".encode())
    return {"codes": view.digest(weight.name), "state": state.hexdigest()}


def record(view: StateView, found: Mapping[str, QuantizedWeight]) -> str:
    """What a writer puts under RECORD in the safetensors metadata, so that swapped scales are found without a reference."""
    return json.dumps({name: digests(view, weight) for name, weight in found.items()}, sort_keys=True)


def against_record(case: Case) -> dict[str, dict[str, bool]]:
    """Per weight that a digest covers: whether its codes and its state are what was recorded."""
    if "quantized record" not in case.orders:
        case.orders["quantized record"] = dict(_against_record(case)) if case.view is not None else {}
    found: dict[str, dict[str, bool]] = case.orders["quantized record"]
    return found


def _against_record(case: Case) -> Iterator[tuple[str, dict[str, bool]]]:
    view = case.view
    assert view is not None
    tensors = _certified(view)
    try:
        recorded = json.loads(view.metadata.get(RECORD, "{}"))
    except (ValueError, TypeError, RecursionError):
        recorded = {}
    for name, weight in model_weights(case).items():
        entry = recorded.get(name) if isinstance(recorded, dict) else None
        if weight.problems:
            continue
        tied = _tied(view, weight)
        if tied is not None:
            yield name, {"codes": tied, "state": tied}
        elif isinstance(entry, dict):
            now = digests(view, weight)
            yield name, {part: entry.get(part) == now[part] for part in ("codes", "state")}
        elif all(n in tensors for n in weight.stored):
            same = {n: tensors[n] == view.digest(n) for n in weight.stored}
            yield name, {"codes": same[name], "state": all(same[n] for n in weight.parts.values())}


def _tied(view: StateView, weight: QuantizedWeight) -> bool | None:
    """Whether codes and scales are those that the digest stored beside them ties together; None without one."""
    beside = f"{weight.name}_digest"
    if beside not in view or view[beside].dtype != "U8" or view[beside].shape != (16,):
        return None
    parts = {role: view.digest(n) for role, n in weight.parts.items() if role != "weight_format"}
    return bytes(view.bytes(beside)) == quant_codes.joint_digest({"weight": view.digest(weight.name), **parts})


def _certified(view: StateView) -> dict[str, str]:
    """The certificate's digest of each stored tensor; none where there is no readable certificate (F03 says so)."""
    try:
        certificate = read_certificate(view) or {"tensors": {}}
    except TensorkeepError:
        return {}
    return {
        stored_name(n, certificate.get("root"), view.format): e["xxh3_128"] for n, e in certificate["tensors"].items()
    }


def undecided(case: Case, count: int) -> str:
    """Why codes and scales could not be held against anything."""
    if case.reference is None:
        return f"{count} quantized weights, no digest that ties codes to scales, and no reference: give the float weights with --reference"
    return f"{count} quantized weights have no counterpart in the reference (or one quantized in another way), and no digest ties codes to scales"
