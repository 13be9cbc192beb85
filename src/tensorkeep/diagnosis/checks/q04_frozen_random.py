"""Q04 frozen quantized layer holds random values: what is quantized, and so can never be trained, was never trained.

What it is
    Quantized weights are frozen. That makes sense for pretrained weights. Where new layers (the down and up
    projections of an adapter) are created, quantized and frozen at once, they keep their initialiser's values for ever
    and only the low-rank pair beside them learns.

How it happens
    A "QLoRA adapter" whose own projections are quantized instead of the backbone's linears. Of such a ViT-S with
    1,185,420 adapter parameters 884,736 are frozen at random and 300,684 train; the backbone stays in full precision,
    so next to nothing is saved (3.1 MB of float32), where NF4 on the backbone itself takes 87.5 MB to 13.6 MB.

How it is seen
    Every value of torch's default Linear lies within 1/sqrt(in_features), evenly: the largest of each block comes
    close to that bound, by a known law. Zeros stay zeros. A normal initialiser is only named where other quantized
    weights of the same file are clearly trained.

What to do
    Quantize the pretrained linears (`--quantize-backbone nf4`), keep new layers in high precision and train them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.codes import Array
from tensorkeep.quantization.stored import QuantizedWeight

CODE = "Q04"
WORDS = {
    "uniform": "torch's default initialiser, uniform within 1/sqrt(in_features)",
    "zero": "zero throughout",
    "normal": "a normal initialiser of the config's spread, beside trained weights",
}


def check(case: Case) -> Iterator[Finding]:
    """A warning for each kind of initialiser that quantized weights still hold."""
    if case.view is None:
        return
    known = {n for n, m in quant_evidence.matches(case).items() if m.verdict == "sound"}  # the reference's own values
    sound = {n: w for n, w in quant_evidence.model_weights(case).items() if not w.problems and n not in known}
    kinds = {name: kind(case, weight) for name, weight in sound.items()}
    normal = [n for n, k in kinds.items() if k == "normal"]
    if len(normal) > len(sound) / 2:  # a whole model of random weights is a test's, not a mistake's
        kinds = {n: k for n, k in kinds.items() if k != "normal"}
    for word in WORDS:
        names = [n for n, k in kinds.items() if k == word]
        if names:
            elements = sum(sound[n].elements for n in names)
            yield Finding(
                CODE,
                "warning",
                f"{len(names)} quantized (so frozen) weights were never trained: {WORDS[word]}; {elements:,} parameters that cannot learn",
                [quant_evidence.hf_name(case, sound[n]) for n in names],
                {"initialiser": word, "parameters": elements, "quantized_weights": len(quant_evidence.weights(case))},
            )


def kind(case: Case, weight: QuantizedWeight) -> str | None:
    """The initialiser whose values a quantized weight still holds, or None."""
    assert case.view is not None and weight.shape is not None
    inputs = int(np.prod(weight.shape[1:]))
    peaks, reach = _peaks(case, weight)
    if not peaks.any() or not _sample(case, weight).any():  # doubly quantized scales of nothing are only nearly zero
        return "zero"
    if uniform(peaks, reach, 1 / np.sqrt(max(inputs, 1))):
        return "uniform"
    spread = (case.model_config or {}).get("initializer_range")
    if isinstance(spread, float) and 0 < spread < 1 and normal(_sample(case, weight), spread):
        return "normal"
    return None


def _peaks(case: Case, weight: QuantizedWeight) -> tuple[Array, int]:
    """The largest magnitude of each block or row, and how many values that is the largest of."""
    assert case.view is not None
    if weight.kind in quant_codes.TABLES:
        assert isinstance(weight.block, int)
        return quantized.four_bit_state(case.view, weight)[1], weight.block
    scales = quantized.row_scales(case.view, weight).reshape(-1)
    top = {"int8": 1.0 if "SCB" in weight.parts else 127.0}.get(weight.kind, 448.0)
    assert isinstance(weight.block, tuple)
    return scales * np.float32(top), weight.block[0] * weight.block[1]


def uniform(peaks: Array, reach: int, bound: float) -> bool:
    """Whether block maxima are those of `reach` values uniform in [-bound, bound].

    The largest of n such magnitudes over the bound is Beta(n, 1): mean n/(n+1), variance n/((n+1)^2 (n+2)).
    """
    if peaks.size < 8 or peaks.max() > 1.02 * bound or peaks.max() < 0.985 * bound:
        return False
    mean, spread = reach / (reach + 1), np.sqrt(reach / ((reach + 1) ** 2 * (reach + 2)) / peaks.size)
    return bool(abs(float(peaks.mean()) / bound - mean) < 0.004 + 4 * spread)


def normal(values: Array, spread: float) -> bool:
    """Whether values are normal with this standard deviation, as far as their number and quantization allow to say."""
    if values.size < 1024:
        return False
    root = 4 / np.sqrt(2 * values.size)
    deviation = float(values.std(dtype=np.float64))
    fourth = float(np.mean(np.square(np.square(values / deviation, dtype=np.float64)))) if deviation else 0.0
    return bool(abs(deviation / spread - 1) < 0.015 + root and abs(fourth - 3) < 0.15 + 10 * root)


def _sample(case: Case, weight: QuantizedWeight) -> Array:
    assert case.view is not None
    return next((v for _, v in quantized.stream_values(case.view, weight)), np.zeros(0, np.float32))
