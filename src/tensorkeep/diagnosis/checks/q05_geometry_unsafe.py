"""Q05 geometry unsafe for the kernel in use: the file is right, and a common kernel computes something else from it.

What it means
    4-bit blocks run through the weight row after row, so a block lies across two rows where the row length is no
    multiple of the block size. The AVX-512 CPU kernel of bitsandbytes (measured: 0.50.2) computes the scale of an
    element from its row, `row * (columns // blocksize) + column // blocksize`, and is wrong from the second row on.
    It is used where the row length is a multiple of 16; other lengths take a slower path that is right.

How it shows
    On CPUs with AVX-512, and without a message, weights are wrong by 25 % instead of 9 % and a model's logits by 96
    %. Such lengths are 96, 176 and 4304 (SigLIP-so400m). A LoRA trained there fits wrong weights. Other faults of
    these kernels are loud: in eval mode on CPUs with AVX512-BF16, layers fail whose output features are no multiple
    of 32 or whose input features are no multiple of 64.

What to do
    On such a CPU load it with tensorkeep, or set `layer.support_avx512bf16_for_cpu = False` and use another
    dequantization; or quantize with a block size that divides the row. On a GPU nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.quantization import codes as quant_codes

CODE = "Q05"


def check(case: Case) -> Iterator[Finding]:
    """Warn of 4-bit weights whose blocks lie across rows in the way that the AVX-512 kernel misreads."""
    misread = {}
    for name, weight in quant_evidence.weights(case).items():
        if (
            weight.kind not in quant_codes.TABLES
            or weight.problems
            or weight.shape is None
            or not isinstance(weight.block, int)
        ):
            continue
        columns = weight.shape[-1]
        if len(weight.shape) > 1 and weight.shape[0] > 1 and columns % weight.block and columns % 16 == 0:
            misread[name] = (columns, weight.block)
    if misread:
        lengths = sorted(set(misread.values()))
        message = (
            f"{len(misread)} quantized weights have rows of {', '.join(str(c) for c, _ in lengths[:6])} elements that "
            f"blocks of {lengths[0][1]} do not divide: bitsandbytes' AVX-512 CPU kernel takes wrong scales for them"
        )
        evidence = {"rows_and_blocks": [list(pair) for pair in lengths], "this_machine_has_avx512": _avx512()}
        yield Finding(
            CODE,
            "warning",
            message,
            [quant_evidence.hf_name(case, quant_evidence.weights(case)[n]) for n in misread],
            evidence,
        )


def _avx512() -> bool | None:
    """Say whether this CPU would use that kernel; None where the system does not tell."""
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
