"""E02 EMA holds frozen, integer or packed state: an averaged copy of what must not be averaged.

What it is
    The averaged copy was made from a whole state dict. Frozen tensors in it are waste. Integers (counters) are
    truncated. Packed codes of quantized weights are destroyed: a byte holds two codes, and one less in the byte is
    another code. Their quantization state makes the copy unloadable in strict mode.

How it happens
    OpenTAD's ModelEma, timm's ModelEmaV2, torch's AveragedModel with its EMA functions.

How it shows
    At decay 0.9999 about 19 % of the bytes of a 4-bit base change and its weights are off by 19 %; an update of a
    ViT-L costs 5 to 12 seconds a step instead of milliseconds.

What to do
    Average trainable floating tensors only. From such a file take the trainable tensors of the average, and codes,
    state and counters from the live copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.ema import Average, average, integer, measured
from tensorkeep.findings import Finding

CODE = "E02"


def check(case: Case) -> Iterator[Finding]:
    """An error where packed codes were changed, a warning where packed state travels, infos for the rest."""
    found = average(case)
    if found is None:
        return
    packed = _packed(case, found)
    shares = {
        n: changed(found, n) for n in packed if n in found.pairs and found.pairs[n][0] in quant_evidence.weights(case)
    }
    codes = [n for n, share in shares.items() if share > 0]
    if codes:
        yield Finding(
            CODE,
            "error",
            f"the average ({found.root}) changed the packed codes of {len(codes)} quantized weights: up to {max(shares.values()):.1%} of the bytes",
            [found.pairs[n][0] for n in codes],
            {"bytes_changed": {n: round(shares[n], 4) for n in codes[:32]}},
            explains=("Q03",),
        )
    elif packed:
        yield Finding(
            CODE,
            "warning",
            f"the average ({found.root}) holds {len(packed)} tensors of quantized weights, unchanged: a strict load refuses them",
            packed,
            {"tensors": len(packed)},
        )
    yield from _waste(case, found, set(packed))


def _packed(case: Case, found: Average) -> list[str]:
    """Clean names of codes and their state in the averaged copy."""
    weights = quant_evidence.weights(case)
    stored = {n for w in weights.values() for n in w.stored}
    clean = {averaged: n for n, (averaged, _) in found.pairs.items()}
    return [clean.get(n, n) for n in (*clean, *found.alone) if n in stored]


def changed(found: Average, name: str) -> float:
    """The share of bytes that differ between averaged and live codes."""
    one, other = (np.frombuffer(found.view.bytes(n), np.uint8) for n in found.pairs[name])
    return float(np.count_nonzero(one != other)) / max(other.size, 1) if one.size == other.size else 1.0


def _waste(case: Case, found: Average, packed: set[str]) -> Iterator[Finding]:
    apart = {n: m for n, m in measured(case).items() if n not in packed}
    numbers = [n for n in apart if integer(found.view[found.pairs[n][0]])]
    if numbers:
        wrong = [n for n in numbers if apart[n][0] > 0]
        yield Finding(
            CODE,
            "info",
            f"the average holds {len(numbers)} integer tensors"
            + (f", {len(wrong)} of them truncated to other values" if wrong else ""),
            [found.pairs[n][0] for n in numbers],
            {"differ": wrong[:32]},
        )
    floating = [n for n in apart if n not in numbers]
    frozen = [n for n in floating if apart[n][0] == 0]
    if frozen and len(frozen) < len(floating):
        nbytes = sum(found.view[found.pairs[n][0]].nbytes for n in frozen)
        yield Finding(
            CODE,
            "info",
            f"{len(frozen)} of {len(floating)} averaged tensors are frozen: {nbytes:,} bytes that repeat the live copy",
            [found.pairs[n][0] for n in frozen],
            {"bytes": nbytes},
        )
