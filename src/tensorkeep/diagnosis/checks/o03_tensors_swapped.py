"""O03 tensors swapped: a tensor holds the content of another of the same shape.

What it means
    Gate and up projection, k and v, two norms, two experts, or the same tensor of two layers changed places; or one
    was copied over the other.

How it happens
    Two rows of a converter's table are exchanged, or a fused gate_up or qkv tensor was split in the wrong order.

How it shows
    Not in names or shapes. Measured: gate and up +20 of loss, k and v +12, norms +13.

What to do
    Exchange them back: `tensorkeep repair` does it. What was overwritten is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.originals import originals
from tensorkeep.diagnosis.evidence.remedy import Remedies
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped

CODE = "O03"


def check(case: Case) -> Iterator[Finding]:
    """Report tensors that hold the content of another tensor of the reference."""
    if case.reference is None:
        return
    found = originals(case)
    if not found:
        return
    case.claim(found, CODE)
    case.results["swaps"] = {n: s.name for n, s in found.items()}
    holds = {n: s.name for n, s in found.items()}
    copied = [n for n, other in holds.items() if other not in holds]
    pairs = sorted({tuple(sorted((n, other))) for n, other in holds.items() if holds.get(other) == n})
    if len(pairs) * 2 == len(holds):
        what = f"{len(pairs)} pairs changed places: {', '.join(' and '.join(_short(p)) for p in pairs[:3])}"
    else:
        n, other = next(iter(holds.items()))
        what = f"{len(holds)} tensors hold another's content, first {n}: that of {other}"
    groups = grouped(holds)
    evidence = {
        "holds": dict(list(holds.items())[:64]),
        "exact": sum(s.exact for s in found.values()),
        "overwritten": copied[:64],
        "groups": groups[:16],
    }
    yield Finding(CODE, "error", what, list(holds), evidence, explains=["V06"], fix=case.repair_command())


def _short(pair: tuple[str, ...]) -> list[str]:
    """Return names without `.weight`."""
    return [n.removesuffix(".weight") for n in pair]


def repair(case: Case, names: list[str], out: Remedies) -> None:
    """Put tensors back under their names; one that was overwritten is lost."""
    places = {content: name for name, content in case.results["swaps"].items()}
    for name in names:
        if name in places:
            out.recipes[name] = lambda source=places[name]: case.values(source)  # type: ignore[misc]
        else:
            out.lose([name], CODE)
    out.done[CODE] = f"put {len(names)} tensors back under their names"
