"""O03 tensors swapped: a tensor holds the content of another of the same shape.

What it is: gate and up, k and v, two norms, two experts, or one kind of two layers changed places; or one was copied
over the other.
How it happens: a converter's table has two rows exchanged; a fused gate_up or qkv was split in the wrong order.
How it shows: nothing by name or shape. gate/up +20 of loss, k/v +12, norms +13 (measured).
What to do: exchange them back; the fix below does. What was overwritten is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from tensorkeep.diagnosis.evidence.case import Case
from tensorkeep.diagnosis.evidence.sources import sources
from tensorkeep.findings import Finding
from tensorkeep.formats.names import grouped

CODE = "O03"


def check(case: Case) -> Iterator[Finding]:
    """Tensors whose content is another's of the reference."""
    if case.reference is None:
        return
    found = sources(case)
    if not found:
        return
    case.claim(found, CODE)
    case.orders["swaps"] = {n: s.name for n, s in found.items()}
    holds = {n: s.name for n, s in found.items()}
    copied = [n for n, other in holds.items() if other not in holds]
    pairs = sorted({tuple(sorted((n, other))) for n, other in holds.items() if holds.get(other) == n})
    if len(pairs) * 2 == len(holds):
        what = f"{len(pairs)} pairs changed places: {', '.join(' and '.join(_short(p)) for p in pairs[:3])}"
    else:
        n, other = next(iter(holds.items()))
        what = f"{len(holds)} tensors hold another's content, first {n}: that of {other}"
    groups = grouped(holds)
    yield Finding(
        CODE,
        "error",
        what,
        list(holds),
        {
            "holds": dict(list(holds.items())[:64]),
            "exact": sum(s.exact for s in found.values()),
            "overwritten": copied[:64],
            "groups": groups[:16],
        },
        explains=["V06"],
        fix=f"tensorkeep repair {case.path} OUT --reference {case.reference.path}",
    )


def _short(pair: tuple[str, ...]) -> list[str]:
    return [n.removesuffix(".weight") for n in pair]
