"""Make one offline HTML page from the document of `diff --json`: what changed, kind by kind and layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report import _heatmap as heatmap
from tensorkeep.commands.report._frame import Section
from tensorkeep.errors import printable

_SPOKEN = {
    "equal": "equal, bit for bit",
    "values": "other values",
    "dtype": "another dtype",
    "shape": "another shape",
    "only_a": "only in A",
    "only_b": "only in B",
}
_MOST = 300  # kinds, and tensors of a list


def page(document: Mapping[str, Any]) -> str:
    """Return the whole page of a comparison, as text.

    >>> "equal: all 0 tensors" in page({"a": "x", "b": "y", "equal": True, "tensors": []})
    True
    """
    found = heatmap.cells(document)
    rows = [row for row in document.get("tensors") or [] if isinstance(row, Mapping) and "name" in row]
    counts = Counter(str(row.get("status")) for row in rows)
    differing = sum(n for status, n in counts.items() if status != "equal")
    kind, verdict = ("findings", f"{differing:,} of {len(rows):,} tensors differ")
    if not differing:
        kind, verdict = "ok", f"equal: all {len(rows):,} tensors, bit for bit"
    facts = [("A", frame.code(document.get("a", ""))), ("B", frame.code(document.get("b", "")))]
    identities = document.get("identities")
    if isinstance(identities, Mapping) and any(identities.get(side) for side in "ab"):
        facts += [(f"identity of {side.upper()}", frame.code(identities.get(side) or "none")) for side in "ab"]
    tiles = [(f"{counts[status]:,}", spoken) for status, spoken in _SPOKEN.items() if counts[status]]
    drawn = heatmap.maps(found) + heatmap.layers_table(found) + heatmap.figures_table(found.values()) if found else ""
    sections = [
        Section("What changed", _kinds(rows) if differing else ""),
        Section("Tensor by tensor", drawn),
        Section("The same rows in another order", _moved(rows)),
        Section("Another dtype or shape, or on one side only", _sides(rows)),
    ]
    shown = f"<p class='verdict {kind}'>{frame.text(verdict)}</p>"
    head = frame.top("Comparison", shown, facts, _said(rows) if differing else "") + frame.tiles(tiles)
    title = printable(f"Comparison of {document.get('a', '')} and {document.get('b', '')}", 180)
    return frame.page(title, head, sections)


def _said(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say what differs most, and what cannot be subtracted."""
    parts = []
    figures = [(f, row) for row in rows if (f := heatmap.number(row.get("relative_difference")))]
    if figures:
        most, row = max(figures, key=lambda pair: pair[0])
        parts.append(f"The greatest relative difference is {most:.3g}: {row['name']}.")
    if moved := sum(row.get("same_rows_in_another_order") is True for row in rows):
        parts.append(f"{moved:,} have the same rows in another order.")
    odd = Counter(str(row.get("status")) for row in rows)
    told = [f"{odd[s]:,} {_SPOKEN[s]}" for s in ("dtype", "shape", "only_a", "only_b") if odd[s]]
    return " ".join([*parts, *([f"{', '.join(told)}."] if told else [])])


def kind_of(name: str) -> str:
    """Return a tensor's name with a star for the numbers of layers and experts.

    >>> kind_of("model.layers.11.mlp.experts.3.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    """List the kinds of tensors that differ: how many of each, in what, and how far."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(kind_of(str(row["name"])), []).append(row)
    listed = []
    for kind, own in kinds.items():
        counts = Counter(str(row.get("status")) for row in own)
        if counts["equal"] == len(own):
            continue
        told = ", ".join(f"{n} {_SPOKEN.get(s, s)}" for s, n in counts.items() if s != "equal")
        figures = [f for row in own if (f := heatmap.number(row.get("relative_difference"))) is not None]
        listed.append((max(figures, default=0.0), [kind, f"{len(own):,}", told, *_range(figures)]))
    listed.sort(key=lambda item: -item[0])
    more = frame.note(f"{len(listed) - _MOST:,} more kinds are not listed") if len(listed) > _MOST else ""
    columns = ["kind of tensor", "tensors", "of these", "least relative difference", "greatest"]
    return frame.table("Kinds of tensors that differ", columns, [row for _, row in listed[:_MOST]], 3, True) + more


def _range(figures: Sequence[float]) -> list[str]:
    """Return the least and the greatest of some figures."""
    return [f"{min(figures):.3g}", f"{max(figures):.3g}"] if figures else ["-", "-"]


def _moved(rows: Sequence[Mapping[str, Any]]) -> str:
    """List tensors that have the same rows in another order."""
    moved = [[str(row["name"])] for row in rows if row.get("same_rows_in_another_order") is True]
    return _bounded("Tensors with the same rows in another order", ["tensor"], moved)


def _sides(rows: Sequence[Mapping[str, Any]]) -> str:
    """List tensors whose dtype or shape differs, or that one side does not have."""
    listed = [
        [str(row["name"]), _SPOKEN.get(str(row.get("status")), ""), _side(row.get("a")), _side(row.get("b"))]
        for row in rows
        if row.get("status") in ("dtype", "shape", "only_a", "only_b")
    ]
    return _bounded("Tensors of another dtype or shape", ["tensor", "difference", "A", "B"], listed)


def _bounded(caption: str, columns: list[str], rows: Sequence[Sequence[object]]) -> str:
    """Return the first rows of a list as a table, and how many more there are."""
    more = frame.note(f"{len(rows) - _MOST:,} more are not listed") if len(rows) > _MOST else ""
    return frame.table(caption, columns, rows[:_MOST], 9, True) + more


def _side(value: Any) -> str:
    """Return dtype and shape of one side."""
    if not isinstance(value, Mapping):
        return "-"
    shape = value.get("shape")
    return printable(f"{value.get('dtype')} {list(shape[:8]) if isinstance(shape, list) else ''}", 80)
