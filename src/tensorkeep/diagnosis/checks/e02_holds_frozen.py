"""E02 EMA holds frozen, integer or packed state: an averaged copy of what must not be averaged.

What it means
    The averaged copy (EMA) was made from a whole state dict. Frozen tensors in it are waste. Integers (counters) are
    cut off. Packed codes of quantized weights are destroyed: a byte holds two codes, and one less in the byte is
    another code. And a strict load refuses the copy because of the quantization state in it.

How it happens
    OpenTAD's ModelEma, timm's ModelEmaV2 and PyTorch's AveragedModel with its EMA functions average everything.

How it shows
    At a decay of 0.9999 about 19 % of the bytes of a 4-bit base change, and its weights are off by 19 %. Averaging
    all of a ViT-L takes 5 to 12 seconds a step instead of milliseconds.

What to do
    Average trained floating tensors only. From such a file take the trained tensors of the average, and codes,
    quantization state and counters from the live copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.ema import Average, average, distances, integer
from tensorkeep.findings import Finding

CODE = "E02"


def check(case: Case) -> Iterator[Finding]:
    """Report changed codes (error), parts of quantized weights (warning), integers and frozen tensors (info)."""
    found = average(case)
    if found is None:
        return
    packed = _packed(case, found)
    shares = {
        n: changed(found, n) for n in packed if n in found.pairs and found.pairs[n][0] in quant_evidence.weights(case)
    }
    codes = [n for n, share in shares.items() if share > 0]
    if codes:
        message = (
            f"the average ({found.root}) changed the packed codes of {len(codes)} quantized weights: up to "
            f"{max(shares.values()):.1%} of the bytes"
        )
        evidence = {"bytes_changed": {n: round(shares[n], 4) for n in codes[:32]}}
        yield Finding(CODE, "error", message, [found.pairs[n][0] for n in codes], evidence, explains=("Q03",))
    elif packed:
        message = (
            f"the average ({found.root}) holds {len(packed)} tensors of quantized weights, unchanged: a strict load "
            "refuses them"
        )
        yield Finding(CODE, "warning", message, packed, {"tensors": len(packed)})
    yield from _waste(case, found, set(packed))


def _packed(case: Case, found: Average) -> list[str]:
    """Return the names of codes and of their quantization state in the averaged copy."""
    weights = quant_evidence.weights(case)
    stored = {n for w in weights.values() for n in w.stored}
    clean = {averaged: n for n, (averaged, _) in found.pairs.items()}
    return [clean.get(n, n) for n in (*clean, *found.alone) if n in stored]


def changed(found: Average, name: str) -> float:
    """Return the share of bytes that differ between averaged and live codes."""
    one, other = (np.frombuffer(found.view.bytes(n), np.uint8) for n in found.pairs[name])
    return float(np.count_nonzero(one != other)) / max(other.size, 1) if one.size == other.size else 1.0


def _waste(case: Case, found: Average, packed: set[str]) -> Iterator[Finding]:
    """Report integers and frozen tensors in the average."""
    apart = {n: m for n, m in distances(case).items() if n not in packed}
    numbers = [n for n in apart if integer(found.view[found.pairs[n][0]])]
    if numbers:
        wrong = [n for n in numbers if apart[n][0] > 0]
        message = f"the average holds {len(numbers)} integer tensors" + (
            f", {len(wrong)} of them truncated to other values" if wrong else ""
        )
        yield Finding(CODE, "info", message, [found.pairs[n][0] for n in numbers], {"differ": wrong[:32]})
    floating = [n for n in apart if n not in numbers]
    frozen = [n for n in floating if apart[n][0] == 0]
    if frozen and len(frozen) < len(floating):
        nbytes = sum(found.view[found.pairs[n][0]].nbytes for n in frozen)
        message = (
            f"{len(frozen)} of {len(floating)} averaged tensors are frozen: {nbytes:,} bytes that repeat the live copy"
        )
        yield Finding(CODE, "info", message, [found.pairs[n][0] for n in frozen], {"bytes": nbytes})
