"""Q02 state of another weight: codes and scales are each well formed, and do not belong together.

What it is
    Packed codes of one weight beside the scales of another: of another model, another layer, another initialisation,
    or of the same layer quantized from other floats.

How it happens
    A load that takes over the packed bytes and keeps the live scales: `strict=False` or a filtered state dict into a
    model that was quantized from a fresh initialisation; DDP, which broadcasts the bytes and not the quantization
    state; FSDP, whose sharded state dict has the bytes alone; scales re-keyed by position.

How it shows
    Nothing complains: shapes and dtypes agree. Measured: weights wrong by 23 % (fresh model of the same
    initialiser), 34-68 % (trained weights under fresh scales), above 200 % (nf4 under fp4, or another spread).

How it is proven
    With the float weights (`--reference`), the codes that should be there and the scale of every block are known
    exactly. Codes right and scales wrong, or scales right and codes of something else: the pair is mixed. Without a
    reference, a digest that ties codes to state says the same; with neither, no test of the file alone can tell.

What to do
    Take codes and state from the same save, or quantize the reference again.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding

CODE = "Q02"


def check(case: Case) -> Iterator[Finding]:
    """Weights whose codes and scales are not each other's."""
    sound = {n: w for n, w in quant_evidence.model_weights(case).items() if not w.problems}
    if not sound:
        return
    found = quant_evidence.matches(case)
    off = {n: m for n, m in found.items() if m.verdict in ("scales", "codes")}
    mixed = {n: m for n, m in off.items() if m.grave}
    if len(mixed) < len(off):
        slight = [m for n, m in off.items() if n not in mixed]
        yield Finding(
            CODE,
            "warning",
            f"{len(slight)} quantized weights have the reference's codes and slightly other scales: a small update that was merged and "
            "quantized again (most of it is lost), or a mixture",
            [m.reference for m in slight],
            {"weights": {m.reference: m.figures for m in slight[:32]}},
        )
    if mixed:
        names = [m.reference for m in mixed.values()]
        case.claim(names, CODE)
        scales = sum(m.verdict == "scales" for m in mixed.values())
        what = (
            "the codes are the reference's, the scales another weight's"
            if scales == len(mixed)
            else "the scales are the reference's, the codes another weight's"
        )
        if 0 < scales < len(mixed):
            what = f"{scales} have another weight's scales, {len(mixed) - scales} another weight's codes"
        worst = max(mixed.values(), key=lambda m: m.relative)
        yield Finding(
            CODE,
            "error",
            f"{len(mixed)} quantized weights mix codes and scales: {what}",
            names,
            {
                "worst": worst.reference,
                **worst.figures,
                "weights": {m.reference: m.figures for m in list(mixed.values())[:32]},
            },
            explains=("V06", "L01"),
        )
    recorded = quant_evidence.against_record(case)
    moved = [n for n, same in recorded.items() if n not in found and not same["state"]]
    if moved:
        names = [quant_evidence.hf_name(case, sound[n]) for n in moved]
        case.claim(names, CODE)
        yield Finding(
            CODE,
            "error",
            f"{len(moved)} quantized weights have another state than the digest beside them says",
            names,
            {"digest": "state differs"},
        )
    strangers = [m for m in found.values() if m.verdict == "another"]
    if strangers:
        worst = max(strangers, key=lambda m: m.relative)
        raise Inconclusive(
            f"{len(strangers)} quantized weights agree with the reference neither in codes nor in scales (error {worst.relative:.3f}, quantization "
            f"alone {worst.expected:.3f}): they were quantized from other weights, so this reference cannot judge them"
        )
    left = set(sound) - set(found) - set(recorded)
    if left:
        raise Inconclusive(quant_evidence.undecided(case, len(left)))
