"""Q04 frozen quantized layer holds random values: what is quantized, and so can never be trained, was never trained.

What it means
    Quantized weights are frozen, which makes sense for pretrained weights. Here new layers, such as the down and up
    projections of an adapter, were created, quantized and frozen at once. They keep their random initial values for
    ever, and only the low-rank pair beside them learns.

How it happens
    A "QLoRA adapter" quantizes its own projections instead of the linears of the backbone. In one such ViT-S, of
    1,185,420 adapter parameters 884,736 are frozen at random and 300,684 train. The backbone stays in full precision,
    so next to nothing is saved (3.1 MB of float32), where NF4 on the backbone turns 87.5 MB into 13.6 MB.

How it is found
    The values of a new torch Linear lie evenly within 1/sqrt(in_features), so the largest of each block comes close
    to that bound in a known way. Zeros stay zeros. A normal initialiser is named only where other quantized weights
    of the same file are clearly trained.

What to do
    Quantize the pretrained linears (`--quantize-backbone nf4`); keep new layers in high precision and train them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import kinds
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
    """Warn of quantized weights that still hold what an initialiser gave, once for each kind of initialiser."""
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
            message = (
                f"{len(names)} quantized (so frozen) weights were never trained: {WORDS[word]}; {elements:,} "
                "parameters that cannot learn"
            )
            evidence = {
                "initialiser": word,
                "parameters": elements,
                "quantized_weights": len(quant_evidence.weights(case)),
            }
            yield Finding(CODE, "warning", message, [quant_evidence.hf_name(case, sound[n]) for n in names], evidence)


def kind(case: Case, weight: QuantizedWeight) -> str | None:
    """Return the initialiser whose values a quantized weight still holds: a key of WORDS, or None."""
    assert case.view is not None and weight.shape is not None
    inputs = int(np.prod(weight.shape[1:]))
    packed = kinds.module(weight.kind) is not None  # scales of these kinds do not tell the largest value exactly
    peaks, reach = (np.zeros(0, np.float32), 1) if packed else _peaks(case, weight)
    # doubly quantized scales of nothing are only nearly zero
    if (not packed and not peaks.any()) or not _sample(case, weight).any():
        return "zero"
    if uniform(peaks, reach, 1 / np.sqrt(max(inputs, 1))):
        return "uniform"
    spread = (case.model_config or {}).get("initializer_range")
    if isinstance(spread, float) and 0 < spread < 1 and normal(_sample(case, weight), spread):
        return "normal"
    return None


def _peaks(case: Case, weight: QuantizedWeight) -> tuple[Array, int]:
    """Return the largest magnitude of each block or row, and how many values it is the largest of."""
    assert case.view is not None
    if weight.kind in quant_codes.TABLES:
        assert isinstance(weight.block, int)
        return quantized.four_bit_state(case.view, weight)[1], weight.block
    scales = quantized.row_scales(case.view, weight).reshape(-1)
    top = {"int8": 1.0 if "SCB" in weight.parts else 127.0}.get(weight.kind, 448.0)
    assert isinstance(weight.block, tuple)
    return scales * np.float32(top), weight.block[0] * weight.block[1]


def uniform(peaks: Array, reach: int, bound: float) -> bool:
    """Say whether block maxima are those of `reach` values uniform in [-bound, bound].

    The largest of n such magnitudes over the bound is Beta(n, 1): mean n/(n+1), variance n/((n+1)^2 (n+2)).
    """
    if peaks.size < 8 or peaks.max() > 1.02 * bound or peaks.max() < 0.985 * bound:
        return False
    mean, spread = reach / (reach + 1), np.sqrt(reach / ((reach + 1) ** 2 * (reach + 2)) / peaks.size)
    return bool(abs(float(peaks.mean()) / bound - mean) < 0.004 + 4 * spread)


def normal(values: Array, spread: float) -> bool:
    """Say whether values look normal with this standard deviation, as far as number and quantization allow."""
    if values.size < 1024:
        return False
    root = 4 / np.sqrt(2 * values.size)
    deviation = float(values.std(dtype=np.float64))
    fourth = float(np.mean(np.square(np.square(values / deviation, dtype=np.float64)))) if deviation else 0.0
    return bool(abs(deviation / spread - 1) < 0.015 + root and abs(fourth - 3) < 0.15 + 10 * root)


def _sample(case: Case, weight: QuantizedWeight) -> Array:
    """Return the first values of a weight, dequantized."""
    assert case.view is not None
    return next((v for _, v in quantized.stream_values(case.view, weight)), np.zeros(0, np.float32))
