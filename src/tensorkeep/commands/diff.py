"""`tensorkeep diff`: two checkpoints compared tensor by tensor."""

from __future__ import annotations

from typing import Any

from tensorkeep.commands.shared import Flag, Say, with_config
from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.names import grouped
from tensorkeep.formats.view import StateView, read
from tensorkeep.output import Output, number

# bytes of both sides up to which identities cost next to nothing, where transformers need not be asked about the model
_SMALL = 256 << 20


def diff(a: str, b: str, /, *, config: str | None = None, identify: Flag = False, say: Say = Say()) -> int:
    """Compare two checkpoints tensor by tensor, whatever their formats and namings.

    Exit code 1 when they differ. The identities of small ones are shown first.

    Args:
        a: A file, a folder, a Hub model id or a URL.
        b: The same, to compare with.
        config: A config.json, or a folder with one, where neither side brings its own and head sizes matter.
        identify: Show the identities of large ones too, for which every byte is read once more.
    """
    from tensorkeep.diagnosis.comparison import compare
    from tensorkeep.models.alignment import rearranges

    out = say.output()
    first, second = with_config(read(a), config), read(b)
    sides = (first, second)
    small = sum(r.nbytes for view in sides for r in view.values()) <= _SMALL and not any(
        rearranges(v.config) for v in sides
    )
    identities = [_identity(out, view) if small or identify else None for view in sides]
    with out.progress() as progress:
        found = compare(first, second, progress)
    counts: dict[str, int] = {}
    for row in found:
        counts[row.status] = counts.get(row.status, 0) + 1
    differing = [r for r in found if r.status != "equal"]
    out_document = {"a": a, "b": b, "equal": not differing, "counts": counts, "tensors": [r.to_json() for r in found]}
    out_document["identities"] = dict(zip("ab", identities))
    if say.json:
        out.document(out_document)
        return 1 if differing else 0
    if small or identify:
        _show_identities(out, identities)
    elements = [sum(h.elements for h in view.values()) for view in (first, second)]
    out.line(f"A {a}: {first.format}, {len(first)} tensors, {elements[0]:,} elements")
    out.line(f"B {b}: {second.format}, {len(second)} tensors, {elements[1]:,} elements")
    if not differing:
        out.line(f"equal: all {len(found)} tensors, bit for bit")
        return 0
    rows = [
        (r.name, _status(r), _sides(r), r.different or "-", number(r.max_difference), number(r.relative))
        for r in differing
    ]
    out.table(
        ["tensor", "difference", "A / B", "elements", "largest", "relative"],
        rows,
        right=["elements", "largest", "relative"],
    )
    out.line(f"{len(differing)} of {len(found)} tensors differ")
    moved = [r.name for r in differing if r.same_rows]
    if moved:
        out.line(f"the same rows in another order: {', '.join(grouped(moved)[:4])}")
    return 1


def _identity(out: Output, view: StateView) -> str | None:
    """Return the identity of one side; None where its tensors cannot be brought under hf names."""
    from tensorkeep.commands.identify import identified

    try:
        found: str = identified(out, view).identity
    except TensorkeepError:
        return None
    return found


def _show_identities(out: Output, identities: list[str | None]) -> None:
    """Say which identities both sides have; a side without one is said to have none."""
    if identities[0] is not None and identities[0] == identities[1]:
        out.line(f"identity of both: {identities[0]}")
        return
    for side, identity in zip("AB", identities):
        out.line(f"identity of {side}: {identity or 'none, tensorkeep identify says why'}")


def _status(row: Any) -> str:
    words = {"only_a": "only in A", "only_b": "only in B", "values": "values", "shape": "shape", "dtype": "dtype"}
    if row.status == "dtype":
        return "dtype, same values" if not row.different else "dtype and values"
    return "same rows, other order" if row.same_rows else words[row.status]


def _sides(row: Any) -> str:
    shown = [f"{h.dtype}{list(h.shape)}" if h else "-" for h in (row.a, row.b)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} / {shown[1]}"
