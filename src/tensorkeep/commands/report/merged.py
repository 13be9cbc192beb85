"""Make one offline HTML page from the document of `merge --json`: how far each tensor moved, relative to its size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report import _heatmap as heatmap
from tensorkeep.commands.report._frame import Section
from tensorkeep.commands.report.differences import kind_of
from tensorkeep.errors import printable
from tensorkeep.output import size

_MOST = 300  # kinds, notes and layers that are listed
_WHAT = "change relative to the weight"
_WEIGHTS = {
    "base": "the base, without the update",
    "merged": "the merged model in floats",
    "plain": "rounded number by number",
    "rounded": "this merge",
}


def page(document: Mapping[str, Any]) -> str:
    """Return the whole page of a merge, as text.

    >>> "no tensor changed" in page({"sink": "out", "merged": [], "adapters": [], "overall": {}})
    True
    """
    merged = document.get("merged")
    rows = [r for r in merged if isinstance(r, Mapping) and "name" in r] if isinstance(merged, list) else []
    cells = {
        str(row["name"]): heatmap.Cell(str(row["name"]), heatmap.number(row.get("change")), "values") for row in rows
    }
    drawn = heatmap.maps(cells, _WHAT, close=True) + heatmap.figures_table(cells.values(), _WHAT) if cells else ""
    sections = [
        Section("What was added", _adapters(document)),
        Section("Kind by kind", _kinds(rows) if rows else _none(document)),
        Section("Tensor by tensor", drawn),
        Section("What rounding keeps", _rounded(document.get("rounded"))),
        Section("Notes", _notes(document.get("notes"))),
    ]
    return frame.page(printable(f"Merge into {document.get('sink', '')}", 180), _head(document, rows), sections)


def _none(document: Mapping[str, Any]) -> str:
    """Say that no tensor is told of, and why where that is known."""
    if isinstance(document.get("rounded"), Mapping):
        return frame.note("A merge that rounds to few bits does not tell the change of each tensor.")
    return frame.note("no tensor changed")


def _head(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's head: from what into what, and what was proven."""
    base = document.get("base")
    facts = [("sink", frame.code(document.get("sink", "")))]
    if isinstance(base, Mapping):
        facts += [("base", frame.code(base.get("path", ""))), ("digest of the base", frame.code(base.get("digest")))]
    onto, kind = document.get("onto"), document.get("quantization")
    if onto:
        quantized = f", {printable(str(kind), 40)} dequantized" if kind and onto == "trained" else ""
        facts.append(("added to", frame.text(f"the {printable(str(onto), 40)} weights{quantized}")))
    proof = document.get("proof")
    shown = ""
    if document.get("proven") is True:
        shown = "<p class='verdict ok'>computed twice, read back: bytes equal</p>"
    if isinstance(proof, Mapping):
        target = frame.text(proof.get("target") or "no program's rules were applied", 200)
        facts.append(("loads in", f"{target} {frame.text(proof.get('version') or '', 60)}"))
    whole = document.get("overall")
    tiles: list[tuple[object, str]] = []
    if isinstance(whole, Mapping):
        tiles += [(_share(whole.get("change")), "change of all merged tensors together")]
        if heatmap.number(whole.get("kept")) is not None:
            tiles += [(_share(whole.get("kept")), "of the update kept if quantized again")]
    count, held = document.get("tensors"), document.get("bytes")
    changed = len(rows) or document.get("merged")
    tiles += [(frame.figure(changed), "tensors changed"), (frame.figure(count), "tensors in all")]
    if isinstance(held, int) and not isinstance(held, bool) and 0 <= held < 1 << 60:
        tiles.append((size(held), "written"))
    return frame.top("Merge", shown, facts, _said(document, changed, whole)) + frame.tiles(tiles)


def _said(document: Mapping[str, Any], changed: object, whole: object) -> str:
    """Say how much of the model changed, and how far."""
    parts = [f"{frame.figure(changed)} of {frame.figure(document.get('tensors'))} tensors changed"]
    by = _mapping(whole).get("change")
    if heatmap.number(by) is not None:
        parts.append(f", by {_share(by)} of their size together")
    kept = _mapping(document.get("rounded")).get("kept")
    if heatmap.number(kept) is not None:
        parts.append(f"; rounding keeps {_share(kept)} of what they compute anew")
    return "".join(parts) + "."


def _share(value: Any) -> str:
    """Return a part of a whole in percent, a dash for what is none.

    >>> _share(0.0213), _share(None)
    ('2.13 %', '-')
    """
    found = heatmap.number(value)
    return "-" if found is None or not math.isfinite(found) else f"{100 * found:.3g} %"


def _adapters(document: Mapping[str, Any]) -> str:
    """List the adapters."""
    adapters = document.get("adapters")
    rows = [
        [a.get("path", ""), a.get("kind", ""), frame.figure(a.get("weight")), frame.figure(a.get("modules"))]
        for a in (adapters if isinstance(adapters, list) else [])[:_MOST]
        if isinstance(a, Mapping)
    ]
    return frame.table("Adapters", ["adapter", "kind", "times", "tensors"], rows, 2, True)


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    """List how far each kind of tensor moved, and what requantizing would keep of that."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((kind_of(str(row["name"])), str(row.get("kind") or "")), []).append(row)
    keeps = any(heatmap.number(row.get("kept")) is not None for row in rows)
    listed = []
    for (kind, how), own in kinds.items():
        changes = sorted(f for row in own if (f := heatmap.number(row.get("change"))) is not None)
        kept = sorted(f for row in own if (f := heatmap.number(row.get("kept"))) is not None)
        cells = [kind, how, f"{len(own):,}", *_three(changes), *(_three(kept) if keeps else [])]
        listed.append((changes[-1] if changes else 0.0, cells))
    listed.sort(key=lambda item: -item[0])
    columns = ["kind of tensor", "added", "tensors", "least change", "median", "greatest"]
    columns += ["least kept", "median kept", "greatest kept"] if keeps else []
    more = frame.note(f"{len(listed) - _MOST:,} more kinds are not listed") if len(listed) > _MOST else ""
    told = frame.note("Change: the Frobenius norm of what was added over that of the weight.")
    kept_told = (
        frame.note("Kept: the part of the update that is left if the weight is quantized again.") if keeps else ""
    )
    body = frame.table("Kinds of tensors that changed", columns, [cells for _, cells in listed[:_MOST]], 2, True)
    return told + kept_told + body + more


def _three(values: Sequence[float]) -> list[str]:
    """Return the least, the median and the greatest of sorted values, in percent."""
    return [_share(v) for v in (values[0], statistics.median(values), values[-1])] if values else ["-"] * 3


def _rounded(rounded: Any) -> str:
    """Tell what `merge --to-bits` measured: divergences from the merged model, and errors layer by layer."""
    if not isinstance(rounded, Mapping):
        return ""
    kl, loss = (_mapping(rounded.get(key)) for key in ("kl", "loss"))
    kept = {"plain": rounded.get("kept_plain"), "rounded": rounded.get("kept"), "base": 0.0, "merged": 1.0}
    at_merged = {"merged": 0.0}
    rows = [
        [spoken, frame.figure(kl.get(name, at_merged.get(name))), _share(kept[name]), frame.figure(loss.get(name))]
        for name, spoken in _WEIGHTS.items()
        if name in kl or name in loss
    ]
    columns = ["weights", "KL to the merged model", "of the update kept", "loss"]
    layers = rounded.get("layers")
    own = [r for r in layers if isinstance(r, Mapping) and "name" in r] if isinstance(layers, list) else []
    cells = {str(r["name"]): heatmap.Cell(str(r["name"]), heatmap.number(r.get("error")), "values") for r in own}
    what = "squared error of a layer's output"
    drawn = heatmap.maps(cells, what, close=True) + heatmap.figures_table(cells.values(), what) if cells else ""
    return frame.table("Rounded weights", columns, rows) + drawn


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return an object of a document; an empty one for what is none."""
    return value if isinstance(value, Mapping) else {}


def _notes(notes: Any) -> str:
    """List the notes of the merge."""
    rows = [n for n in notes if isinstance(n, Mapping)] if isinstance(notes, list) else []
    items = "".join(
        f"<li><span class='badge info'>{frame.text(n.get('code', ''), 12)}</span> "
        f"{frame.text(n.get('message', ''), 1000)}</li>"
        for n in rows[:_MOST]
    )
    return f"<ul class='causes'>{items}</ul>" if items else ""
