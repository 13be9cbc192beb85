"""Q07 codes are noise: they are spread as no quantization of weights spreads them.

What it means
    Codes, scales and config are well formed, and the codes are no rounded weights: all of them are equally often
    there, as in random bytes. Or, as a warning, 8-bit codes fill less than a sixteenth of the range that their scale
    gives them, so the scale was not chosen for them.

How it happens
    A layer was created and its codes never loaded, or they were read in another order of bits than the file has (GPTQ
    as AWQ, high halves first, fp8 bytes as int8); the file was encrypted, compressed or overwritten; a wrong offset
    took another tensor's bytes. The warning: scales of another model, or scales that were applied twice.

How it shows
    Nothing complains, and the model answers with random tokens.

How it is found
    Trained weights are many small ones and few large ones: codes near zero are common, those at the ends rare. With
    groups of 32 and 4 bits the commonest code is four times as common as the rarest, with larger groups more. Where a
    reference holds the same values nothing is said. Values that lie evenly between two bounds, as in a layer that was
    just created, look like noise in 8 bits, and in 4 where the inputs of a group lie apart.

What to do
    Take the file from where it is whole, or quantize the float weights again. That codes are not noise does not prove
    that they are this model's: Q02 says what does.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.checks import q04_frozen_random
from tensorkeep.diagnosis.evidence import noise
from tensorkeep.diagnosis.evidence import quantized as quant_evidence
from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.findings import Finding
from tensorkeep.quantization.stored import QuantizedWeight

CODE = "Q07"


def check(case: Case) -> Iterator[Finding]:
    """Report weights whose codes are equally often there, and warn of codes that do not fill their range."""
    if case.view is None:
        return
    known = {n for n, m in quant_evidence.matches(case).items() if m.verdict == "sound"}  # the reference's own values
    weights = {n: w for n, w in quant_evidence.model_weights(case).items() if not w.problems and n not in known}
    even, empty = {}, {}
    for name, weight in weights.items():
        found = noise.spread(case.view, weight)
        if found is not None and found.even and not _fresh(case, weight):
            even[name] = found
        elif noise.too_short(reached := noise.reach(case.view, weight)):
            empty[name] = reached
    if even:
        names = [quant_evidence.hf_name(case, weights[n]) for n in even]
        case.claim(names, CODE)
        of = sorted({weights[n].kind for n in even})
        message = (
            f"{len(even)} of {len(weights)} quantized weights ({', '.join(of)}) hold noise: every code is equally "
            "often there, as in random bytes"
        )
        evidence = {
            "largest_distance_from_equal_shares": round(max(c.uneven for c in even.values()), 3),
            "codes_looked_at": sum(c.looked_at for c in even.values()),
        }
        yield Finding(CODE, "error", message, names, evidence, explains=("V06", "L01", "Q02", "Q03"))
    if empty:
        least = min(r or 0 for r in empty.values())
        names = [quant_evidence.hf_name(case, weights[n]) for n in empty]
        message = (
            f"{len(empty)} quantized weights leave the range of their codes empty: the largest code of a block is "
            f"{least:.1%} of the largest that there is, so the scales are probably others'"
        )
        yield Finding(CODE, "warning", message, names, {"range_filled": round(least, 4)})


def _fresh(case: Case, weight: QuantizedWeight) -> bool:
    """Say whether a weight holds what torch's default initialiser gives, of which Q04 warns: evenly spread values."""
    return q04_frozen_random.kind(case, weight) == "uniform"
