"""Q03 packed codes were averaged: bytes that stand for two 4-bit codes went through arithmetic.

What it means
    An average of weights (EMA, SWA, model soup) treated packed codes as numbers: it computed `d*e + (1-d)*m` as
    floats and cut the result off to a byte. A byte holds two codes, so one less in the byte is another code, not a
    smaller weight. int8 codes are pulled towards zero in the same way; codes stored as bf16 or fp32 suffer more.

How it happens
    OpenTAD's ModelEma, timm's ModelEmaV2 and PyTorch's AveragedModel with its EMA functions average every tensor of a
    state dict, and the frozen quantized base is among them. At a decay of 0.9999 about 19 % of the bytes of a 4-bit
    base change.

How it shows
    No error and no NaN: the base is wrong by about 19 % (nf4), 41 % (stored as fp32), or 1 % (int8, lost in its
    noise).

How it is found
    With the float weights as reference every code is known: scales right, codes wrong and nearly all of them lower
    (int8: nearer to zero) means averaged and cut off. Without one, a digest tells; or, as a hint, blocks without
    their full-scale code: quantization gives it to the largest element of every block, and averaging takes it away.

What to do
    The original codes are lost in this file: take the base from the checkpoint that training started from. Average
    only tensors that are trained (`requires_grad`), by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.quantized_digests import against_record, undecided
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding

CODE = "Q03"


def check(case: Case) -> Iterator[Finding]:
    """Report weights whose scales are right and whose codes were changed."""
    sound = {n: w for n, w in quant_evidence.model_weights(case).items() if not w.problems}
    if not sound or case.view is None:
        return
    found = quant_evidence.matches(case)
    averaged = [m for m in found.values() if m.verdict == "averaged"]
    if averaged:
        names = [m.reference for m in averaged]
        case.claim(names, CODE)
        worst = max(averaged, key=lambda m: m.relative)
        fell = sum(m.fell >= 0.95 for m in averaged)
        how = "lower, as averaging in bytes leaves them" if fell > len(averaged) / 2 else "changed after quantization"
        message = (
            f"{len(averaged)} quantized weights have the reference's scales and other codes: up to "
            f"{max(m.codes_off for m in averaged):.1%} of the codes are {how}"
        )
        evidence = {
            "worst": worst.reference,
            **worst.figures,
            "weights": {m.reference: m.figures for m in averaged[:32]},
        }
        yield Finding(CODE, "error", message, names, evidence, explains=("V06", "L01"))
    recorded = against_record(case)
    changed = [n for n, same in recorded.items() if n not in found and same["state"] and not same["codes"]]
    if changed:
        names = [quant_evidence.hf_name(case, sound[n]) for n in changed]
        case.claim(names, CODE)
        message = f"{len(changed)} quantized weights have other codes than the digest beside them says"
        yield Finding(CODE, "error", message, names, {"digest": "codes differ"})
    left = [n for n in sound if n not in found and n not in recorded]
    if left:
        yield from _hint(case, left)
        raise Inconclusive(undecided(case, len(left)))


def _hint(case: Case, names: list[str]) -> Iterator[Finding]:
    """Warn of blocks without their full-scale code, which every sound quantization gives; needs no reference."""
    assert case.view is not None
    weights = quant_evidence.weights(case)
    lost = {n: quant_evidence.averaged_blocks(case.view, weights[n]) for n in names}
    odd = [n for n, (missing, _) in lost.items() if missing]
    if odd:
        blocks = sum(lost[n][0] for n in odd)
        message = (
            f"{blocks} blocks of {len(odd)} quantized weights have no full-scale code, although absmax is a block's "
            "largest value: their codes were probably changed after quantization"
        )
        evidence = {"blocks": blocks, "blocks_looked_at": sum(looked for _, looked in lost.values())}
        yield Finding(CODE, "warning", message, [quant_evidence.hf_name(case, weights[n]) for n in odd], evidence)
