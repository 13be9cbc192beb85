"""Draw the heat map of a diagnosis as inline SVG: tensor kinds down, layers across, one square for each tensor.

Colour says how far a tensor is from the reference (relative difference, by powers of ten); a word in the square says
what a finding said of it. Names come out of untrusted files: everything is escaped, nothing is looked up by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from tensorkeep.errors import printable
from tensorkeep.formats.names import natural

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<n>\d{1,5})\.(?P<kind>.+)")
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")
_STEPS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # lower ends of the classes d1..d6; d0 is equal
_WORDS = {"only_a": "not in the reference", "only_b": "missing", "shape": "another shape", "dtype": "another dtype"}
_MOST = 400  # layers drawn; a file that claims more is cut, and the page says so
_RANK = {"error": 3, "warning": 2, "info": 1, "": 0}


@dataclass(frozen=True)
class Cell:
    """What is known of one tensor (or of the worst of a layer's experts).

    Args:
        name: the tensor's name.
        relative: its relative difference to the reference; None where it was not compared.
        status: what a diff says: "equal", "only_a", "only_b", "shape", "dtype".
        code: of the finding that speaks of it.
        severity: of that finding.
    """

    name: str
    relative: float | None = None
    status: str = ""
    code: str = ""
    severity: str = ""

    @property
    def level(self) -> str:
        """Its colour class: d0 (equal) to d6, dx for what cannot be subtracted, du for nothing known."""
        if self.status in ("only_a", "only_b", "shape"):
            return "dx"
        if self.relative is None:
            return "dx" if self.severity == "error" else "d0" if self.status == "equal" else "du"
        if not math.isfinite(self.relative):
            return "dx"
        return "d0" if self.relative == 0 else f"d{sum(self.relative > s for s in _STEPS)}"

    @property
    def weight(self) -> tuple[int, float]:
        """A key that sorts the worst last."""
        figure = 0.0 if self.relative is None else self.relative if math.isfinite(self.relative) else math.inf
        return _RANK[self.severity], math.inf if self.level == "dx" else figure

    @property
    def told(self) -> str:
        """The tooltip's text."""
        parts = [printable(self.name, 300)]
        if self.status in _WORDS:
            parts.append(_WORDS[self.status])
        if self.relative is not None:
            parts.append("equal" if self.relative == 0 else f"relative difference {self.relative:.3g}")
        return ", ".join([*parts, *([self.code] if self.code else [])])


def cells(document: Mapping[str, Any], differences: Mapping[str, Any] | None = None) -> dict[str, Cell]:
    """Make a cell for every tensor that the diagnosis or the diff speaks of.

    Figures come from `tensors[].relative_difference` of a diff document (or of the diagnosis, where it has them), and
    from evidence that is keyed by tensor name.
    """
    rows = [r for d in (document, differences or {}) for r in _rows(d.get("tensors"))]
    found = {
        str(r["name"]): Cell(str(r["name"]), number(r.get("relative_difference")), str(r.get("status") or ""))
        for r in rows
    }
    named = [f for f in _rows(document.get("findings")) if isinstance(f.get("tensors"), list)]
    # findings come causes first: the first error to speak of a tensor is the one to show
    for finding in sorted(named, key=lambda f: -_RANK.get(str(f.get("severity")), 0)):
        figures = _per_tensor(finding.get("evidence"), set(map(str, finding["tensors"])))
        for name in map(str, finding["tensors"]):
            old = found.get(name, Cell(name))
            relative = old.relative if old.relative is not None else figures.get(name)
            severity = str(finding.get("severity")) if str(finding.get("severity")) in _RANK else "info"
            code = str(finding.get("code"))[:4]
            keep = old.code or (severity == "info" and old.relative is not None)
            found[name] = Cell(name, relative, old.status, *((old.code, old.severity) if keep else (code, severity)))
    return found


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """Return the entries of a list that have a name or a code; nothing for what is no list."""
    if not isinstance(value, list):
        return []
    return [r for r in value if isinstance(r, Mapping) and ("name" in r or "code" in r)]


def number(value: Any) -> float | None:
    """Read a figure of a document; infinities and NaN come as strings there."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return math.inf
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _per_tensor(evidence: Any, names: set[str], plain: bool = False) -> dict[str, float]:
    """Collect relative differences out of evidence, by tensor name.

    Evidence has them as {name: {"relative_difference": x}} or [{"name": ..., ...}], also below another key; plain
    numbers count (`plain`) below a key that begins with `relative`.
    """
    out: dict[str, float] = {}
    if isinstance(evidence, Mapping):
        for key, value in evidence.items():
            if key in names:
                if isinstance(value, Mapping):
                    value = value.get("relative_difference")
                elif not plain:
                    continue
                if (figure := number(value)) is not None:
                    out[str(key)] = abs(figure)
            elif isinstance(value, Mapping):
                out |= _per_tensor(value, names, str(key).startswith("relative"))
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, Mapping) and "name" in item:
                        out |= _per_tensor({str(item["name"]): item}, names)
    return out


# -- drawing --------------------------------------------------------------------------------------------------------


def maps(found: Mapping[str, Cell]) -> str:
    """Draw every stack of layers, and the tensors outside of them."""
    stacks: dict[str, dict[tuple[str, int], list[Cell]]] = {}
    outside = []
    for name, cell in found.items():
        match = _LAYER.fullmatch(name)
        if match:
            kind = _EXPERT.sub(".*", match["kind"])
            stacks.setdefault(match["stack"], {}).setdefault((kind, int(match["n"])), []).append(cell)
        else:
            outside.append(cell)
    parts = [_stack(name, grid) for name, grid in sorted(stacks.items(), key=lambda s: -len(s[1]))]
    return "".join(parts) + _outside(sorted(outside, key=lambda c: natural(c.name)))


def _stack(stack: str, grid: Mapping[tuple[str, int], list[Cell]]) -> str:
    """Draw one stack of layers."""
    layers = sorted({n for _, n in grid})
    kinds = sorted({k for k, _ in grid}, key=_order)
    shown = layers[:_MOST]
    wide, every = next(
        (w, e) for most, w, e in ((20, 30, 1), (30, 24, 1), (46, 16, 5), (math.inf, 9, 10)) if len(shown) <= most
    )
    tall, left, top = max(wide, 16), 8 + 7.2 * min(max(map(len, kinds)), 44), 24
    width, height = left + wide * len(shown) + 4, top + tall * len(kinds) + 4
    out = [_frame(width, height, "differences by layer and tensor")]
    for column, layer in enumerate(shown):
        if layer % every == 0:
            x = left + wide * (column + 0.5)
            out.append(f'<text class="axis" x="{x:.1f}" y="{top - 8}" text-anchor="middle">{layer}</text>')
    for row, kind in enumerate(kinds):
        middle = top + tall * (row + 0.5) + 4
        out.append(
            f'<text class="label" x="{left - 8:.1f}" y="{middle:.1f}" text-anchor="end">{escape(_short(kind))}</text>'
        )
        for column, layer in enumerate(shown):
            found = grid.get((kind, layer))
            worst = max(found, key=lambda c: c.weight) if found else None
            out.append(_square(worst, left + wide * column, top + tall * row, wide, tall))
    cut = f"<p class='note'>{len(layers) - _MOST} more layers are not drawn.</p>" if len(layers) > _MOST else ""
    title = f"<h3>{escape(printable(stack, 120))}<small> · layer number across</small></h3>"
    return f"{title}<div class='scroll'>{''.join(out)}</svg></div>{cut}"


def _frame(width: float, height: int, label: str) -> str:
    """Return the opening tag of a drawing."""
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    return f'<svg {size} role="img" aria-label="{label}">'


def _outside(found: list[Cell]) -> str:
    """Draw one wide square for each tensor that belongs to no layer."""
    if not found:
        return ""
    rows, shown = [], found[:_MOST]
    left = 8 + 7.2 * min(max(len(c.name) for c in shown), 56)
    for row, cell in enumerate(shown):
        name = escape(_short(cell.name, 56))
        rows.append(f'<text class="label" x="{left - 8:.1f}" y="{row * 28 + 19}" text-anchor="end">{name}</text>')
        rows.append(_square(cell, left, row * 28, 52, 28))
    width, height = left + 60, 28 * len(shown) + 4
    svg = _frame(width, height, "differences outside the layers")
    cut = f"<p class='note'>{len(found) - _MOST} more tensors are not drawn.</p>" if len(found) > _MOST else ""
    return f"<h3>outside the layers</h3><div class='scroll'>{svg}{''.join(rows)}</svg></div>{cut}"


def _square(cell: Cell | None, x: float, y: float, width: float, height: float) -> str:
    """Draw one square with its tooltip; an empty one for None."""
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" rx="3"'
    if cell is None:
        return f'<rect class="none" {box}/>'
    mark = {"error": "bad", "warning": "warn"}.get(cell.severity, "")
    word = cell.code if mark and width >= 24 else ""
    middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 3.5:.1f}" text-anchor="middle"'
    text = f'<text class="code {cell.level}" {middle}>{escape(word)}</text>' if word else ""
    return f'<g><title>{escape(cell.told)}</title><rect class="{cell.level} {mark}" {box}/>{text}</g>'


def _short(text: str, most: int = 44) -> str:
    """Return a printable text cut at its beginning."""
    plain = printable(text, 300)
    return plain if len(plain) <= most else f"…{plain[-most + 1 :]}"


def _order(kind: str) -> tuple[int, str]:
    """Sort attention before what follows it, and norms where the layer begins."""
    places = (
        "input_layernorm",
        "layernorm_before",
        "attn",
        "attention",
        "post_attention",
        "layernorm_after",
        "gate",
        "mlp",
        "intermediate",
    )
    return next((i for i, word in enumerate(places) if word in kind), len(places)), kind


def legend() -> str:
    """Say what the colours mean."""
    words = ("equal", "≤ 1e-4", "≤ 1e-3", "≤ 0.01", "≤ 0.1", "≤ 1", "> 1")
    squares = [f'<span><i class="key d{i}"></i>{escape(word)}</span>' for i, word in enumerate(words)]
    extra = [
        '<span><i class="key dx"></i>missing, or no number</span>',
        '<span><i class="key du"></i>not compared</span>',
    ]
    return f"<p class='legend'><b>relative difference</b> {' '.join([*squares, *extra])}</p>"


def figures_table(found: Iterable[Cell]) -> str:
    """Return the figures as a table, worst first, for readers without the picture."""
    rows = sorted((c for c in found if c.weight > (0, 0.0)), key=lambda c: c.weight, reverse=True)[:_MOST]
    if not rows:
        return ""
    lines = [
        f"<tr><td class='name'>{escape(printable(c.name, 300))}</td><td>{escape(_WORDS.get(c.status, c.status))}</td>"
        f"<td class='num'>{'' if c.relative is None else f'{c.relative:.3g}'}</td><td>{escape(c.code)}</td></tr>"
        for c in rows
    ]
    head = "<tr><th>tensor</th><th>status</th><th class='num'>relative difference</th><th>code</th></tr>"
    return (
        f"<details><summary>The figures as a table ({len(rows)} tensors)</summary>"
        f"<div class='scroll'><table>{head}{''.join(lines)}</table></div></details>"
    )
