"""Q02 state of another weight: codes and scales are each well formed, and do not belong together.

What it means
    The packed codes of one weight lie beside the scales of another: of another model, another layer, another random
    initialisation, or of the same layer quantized from other floats.

How it happens
    A load took the packed bytes and kept the scales in memory: with `strict=False` or a filtered state dict into a
    model that was quantized from a fresh initialisation. Or DDP broadcast the bytes and not the quantization state;
    FSDP's sharded state dict has the bytes alone; scales were given new names by position.

How it shows
    Nothing complains: shapes and dtypes agree. Measured, weights are wrong by 23 % (the same initialiser), 34 to 68 %
    (trained weights under fresh scales) or above 200 % (nf4 codes under fp4, or scales of another size).

How it is found
    With the float weights as `--reference`, the right codes and the right scale of every block are known exactly.
    Right codes with wrong scales, or right scales with codes of something else, are a mixture. Without a reference, a
    digest over codes and state tells the same. With neither, nothing in the file can.

What to do
    Take codes and state from the same save, or quantize the reference again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.quantized import Match
from tensorkeep.diagnosis.evidence.quantized_digests import against_record, undecided
from tensorkeep.errors import Inconclusive
from tensorkeep.findings import Finding

CODE = "Q02"


def check(case: Case) -> Iterator[Finding]:
    """Report weights whose codes and scales do not belong together."""
    sound = {n: w for n, w in quant_evidence.model_weights(case).items() if not w.problems}
    if not sound:
        return
    found = quant_evidence.matches(case)
    yield from _mixed(case, [m for m in found.values() if m.verdict in ("scales", "codes")])
    recorded = against_record(case)
    moved = [n for n, same in recorded.items() if n not in found and not same["state"]]
    if moved:
        names = [quant_evidence.hf_name(case, sound[n]) for n in moved]
        case.claim(names, CODE)
        message = f"{len(moved)} quantized weights have another state than the digest beside them says"
        yield Finding(CODE, "error", message, names, {"digest": "state differs"})
    strangers = [m for m in found.values() if m.verdict == "another"]
    if strangers:
        worst = max(strangers, key=lambda m: m.relative)
        raise Inconclusive(
            f"{len(strangers)} quantized weights agree with the reference neither in codes nor in scales "
            f"(error {worst.relative:.3f}, quantization alone {worst.expected:.3f}): "
            "they were quantized from other weights, so this reference cannot judge them"
        )
    left = set(sound) - set(found) - set(recorded)
    if left:
        raise Inconclusive(undecided(case, len(left)))


def _mixed(case: Case, off: list[Match]) -> Iterator[Finding]:
    """Report weights of which either the codes or the scales are the reference's: slight differences are a warning."""
    mixed, slight = [m for m in off if m.grave], [m for m in off if not m.grave]
    if slight:
        message = (
            f"{len(slight)} quantized weights have the reference's codes and slightly other scales: "
            "a small update that was merged and quantized again (most of it is lost), or a mixture"
        )
        yield Finding(CODE, "warning", message, [m.reference for m in slight], {"weights": _figures(slight)})
    if not mixed:
        return
    names = [m.reference for m in mixed]
    case.claim(names, CODE)
    scales = sum(m.verdict == "scales" for m in mixed)
    if scales == len(mixed):
        what = "the codes are the reference's, the scales another weight's"
    elif not scales:
        what = "the scales are the reference's, the codes another weight's"
    else:
        what = f"{scales} have another weight's scales, {len(mixed) - scales} another weight's codes"
    worst = max(mixed, key=lambda m: m.relative)
    message = f"{len(mixed)} quantized weights mix codes and scales: {what}"
    evidence = {"worst": worst.reference, **worst.figures, "weights": _figures(mixed)}
    yield Finding(CODE, "error", message, names, evidence, explains=("V06", "L01"))


def _figures(found: list[Match]) -> dict[str, dict[str, Any]]:
    """Return the figures of the first weights, for evidence."""
    return {m.reference: m.figures for m in found[:32]}
