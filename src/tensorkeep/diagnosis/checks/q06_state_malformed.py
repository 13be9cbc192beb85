"""Q06 quantization state malformed: the state contradicts its own description.

What it means
    `quant_state` says shape, block size, kind and dtype. The number of code bytes and the dtype and shape of every
    scale and map follow from these, and something else is stored. Also reported: scales that are negative or not
    finite, a map that is not the map of its kind, a shape that is not the reference's.

How it happens
    On CPUs with AVX512-BF16, a forward pass of bitsandbytes in eval mode rearranges a 4-bit layer in place. A save
    after that (without double quantization, which is the default in transformers) writes `absmax` transposed and
    rounded to bf16: [K/64, N] instead of [N*K/64]. `.half()` on codes that are stored as bf16 converts the bytes. A
    cast of a whole state dict rounds the scales.

How it shows
    The transposed case loads without a word: weights are wrong by 23 %, logits by 39 %.

What to do
    Save before any forward pass in eval mode on a CPU (or with `support_avx512bf16_for_cpu = False`), or quantize the
    float weights again. Where only the order of the scales is wrong they are still there, rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tensorkeep.conversion.dequantizing import turned
from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.formats.view import StateView
from tensorkeep.quantization import codes as quant_codes
from tensorkeep.quantization import kinds
from tensorkeep.quantization import stored as quantized
from tensorkeep.quantization.stored import QuantizedWeight

CODE = "Q06"


def check(case: Case) -> Iterator[Finding]:
    """Report states that contradict themselves, grouped by what is wrong."""
    if case.view is None:
        return
    groups: dict[str, list[str]] = {}
    examples: dict[str, str] = {}
    for name, weight in quant_evidence.weights(case).items():
        said = [p.message for p in weight.problems if p.code == CODE]
        if not weight.problems:
            said = [*_values(case.view, weight), *_against_reference(case, weight)]
        for message in said:
            kind = " ".join(message.split()[:2])
            groups.setdefault(kind, []).append(quant_evidence.hf_name(case, weight))
            examples.setdefault(kind, f"{name}: {message}")
    for kind, names in groups.items():
        case.claim(names, CODE)
        message = f"{len(names)} quantized weights are malformed: {examples[kind]}"
        yield Finding(CODE, "error", message, names, {"example": examples[kind]}, explains=("S01", "S04", "V06", "L01"))


def _values(view: StateView, weight: QuantizedWeight) -> Iterator[str]:
    """Say what is wrong with the values of scales and maps."""
    if weight.kind in quant_codes.TABLES:
        table, scales = quantized.four_bit_state(view, weight)
        if not np.allclose(table, quant_codes.TABLES[weight.kind], atol=1e-6):
            other = next((k for k, t in quant_codes.TABLES.items() if np.allclose(table, t, atol=1e-6)), None)
            yield (
                f"quant_map is {other}'s, the state says {weight.kind}"
                if other
                else f"quant_map is not that of {weight.kind}"
            )
    else:
        scales = quantized.row_scales(view, weight)
    bad = int(np.count_nonzero(~np.isfinite(scales)))
    # double quantization may round a scale of nothing to slightly below zero
    signed = weight.nested is not None or kinds.module(weight.kind) is not None
    negative = 0 if signed else int(np.count_nonzero(scales < 0))
    if bad or negative:
        yield f"scales that are not finite or negative: {bad + negative} of {scales.size}"


def _against_reference(case: Case, weight: QuantizedWeight) -> Iterator[str]:
    """Say where the shape in the state is not the reference's."""
    name = quant_evidence.hf_name(case, weight)
    wanted = case.reference_tensors.get(name)
    if wanted is None or not _plain(wanted.dtype, wanted.shape):
        return
    shape = wanted.shape[::-1] if turned(case.model_config, name) else wanted.shape
    if shape != weight.shape:
        yield f"shape {list(weight.shape or ())} in the state, {list(wanted.shape)} in the reference"


def _plain(dtype: str, shape: tuple[int, ...]) -> bool:
    """Say whether the reference's own tensor is a float weight and no column of packed codes."""
    return dtype in ("F64", "F32", "F16", "BF16") and shape[1:] != (1,)
