"""Draw tensors as a map: kinds of tensors down, layers across, one square for each tensor.

Colour says how far a tensor is from another one (relative difference, by powers of ten); a word in the square says what
a finding said of it. Where there are more layers than squares fit, neighbours share a square, which shows the worst.
Names come out of untrusted files: everything is escaped, nothing is looked up by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorkeep.commands.report import _frame as frame
from tensorkeep.errors import printable
from tensorkeep.formats.names import natural

_LAYER = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<n>\d{1,5})\.(?P<kind>.+)")
_BLANK = {"error": "bad", "warning": "warn"}
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")
_STEPS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # lower ends of the classes d1..d6; d0 is equal
_WORDS = {"only_a": "not in the reference", "only_b": "missing", "shape": "another shape", "dtype": "another dtype"}
_MOST = 400  # rows of a table, and tensors outside of layers that are drawn
_COLUMNS, _WORDY = 128, 24  # squares across at most, and up to how many have room for a code
_STACKS, _KINDS = 16, 80  # stacks of layers, and kinds of tensors of one, that are drawn
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
        """Its colour class on the usual scale."""
        return self.level_on(_STEPS)

    def level_on(self, steps: Sequence[float]) -> str:
        """Its colour class: d0 (equal) to d6, dx for what cannot be subtracted, du for nothing known.

        Args:
            steps: the lower ends of d1 to d6.
        """
        if self.status in ("only_a", "only_b", "shape"):
            return "dx"
        if self.relative is None:
            return "dx" if self.severity == "error" else "d0" if self.status == "equal" else "du"
        if not math.isfinite(self.relative):
            return "dx"
        return "d0" if self.relative == 0 else f"d{sum(self.relative > s for s in steps)}"

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
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e300 else math.inf  # a whole number may be longer than any float


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

Grid = dict[tuple[str, int], list[Cell]]


def stacks(found: Mapping[str, Cell]) -> tuple[dict[str, Grid], list[Cell]]:
    """Sort tensors into stacks of layers, by kind and layer; and those that belong to no layer."""
    layered: dict[str, Grid] = {}
    outside = []
    for name, cell in found.items():
        match = _LAYER.fullmatch(name)
        if match:
            kind = _EXPERT.sub(".*", match["kind"])
            layered.setdefault(match["stack"], {}).setdefault((kind, int(match["n"])), []).append(cell)
        else:
            outside.append(cell)
    return dict(sorted(layered.items(), key=lambda s: -len(s[1]))), sorted(outside, key=lambda c: natural(c.name))


def maps(found: Mapping[str, Cell], what: str = "relative difference", close: bool = False) -> str:
    """Draw every stack of layers, and the tensors outside of them, with what the colours mean.

    Args:
        found: cells by the names of their tensors.
        what: what the colour says.
        close: whether the colours may be spread over the figures that there are, where powers of ten would tell few of
            them apart.
    """
    layered, outside = stacks(found)
    steps = _spread(found.values()) if close else _STEPS
    parts = [_stack(name, grid, steps) for name, grid in list(layered.items())[:_STACKS]]
    if len(layered) > _STACKS:
        parts.append(frame.note(f"{len(layered) - _STACKS} more stacks of layers are not drawn"))
    return legend(what, steps) + "".join(parts) + _outside(outside, steps)


def _spread(found: Iterable[Cell]) -> Sequence[float]:
    """Return the lower ends of six classes between the least and the greatest figure; the usual ones if far apart.

    >>> _spread([Cell("a", 0.01), Cell("b", 0.04)])
    (0.0, 0.013, 0.016, 0.02, 0.025, 0.032)
    """
    figures = [c.relative for c in found if c.relative and math.isfinite(c.relative)]
    if not figures or not 1.5 < max(figures) / min(figures) < 100:
        return _STEPS
    share = max(figures) / min(figures)
    return (0.0, *(float(f"{min(figures) * share ** (n / 6):.2g}") for n in range(1, 6)))


def _stack(stack: str, grid: Grid, steps: Sequence[float]) -> str:
    """Draw one stack of layers."""
    layers = sorted({n for _, n in grid})
    kinds = sorted({k for k, _ in grid}, key=_order)
    size = -(-len(layers) // _COLUMNS)
    blocks = [layers[start : start + size] for start in range(0, len(layers), size)]
    rows = []
    for kind in kinds[:_KINDS]:
        squares = []
        for column, block in enumerate(blocks):
            cells = [cell for layer in block for cell in grid.get((kind, layer), ())]
            if cells:
                where = f"layer {_span(block)}" + (", the worst: " if len(cells) > 1 else ": ")
                squares.append(_square(max(cells, key=lambda c: c.weight), where, column, len(blocks), steps))
        rows.append(_row(_short(kind), "".join(squares)))
    every = next(e for e in (1, 2, 5, 10, 20, 50) if len(blocks) / e <= 13)
    marks = "".join(
        f'<text x="{100 * (n + 0.5) / len(blocks):.2f}%" y="13" text-anchor="middle">{block[0]}</text>'
        for n, block in enumerate(blocks)
        if n % every == 0
    )
    notes = [f"{size} layers share a square, which shows the worst of them"] if size > 1 else []
    notes += [f"{len(kinds) - _KINDS} more kinds of tensors are not drawn"] if len(kinds) > _KINDS else []
    title = f"<h3>{frame.text(stack, 120)} <small>layers across</small></h3>"
    axis = f"<div class='maprow axis'><span></span><svg aria-hidden='true'>{marks}</svg></div>"
    return (
        title
        + _figure(f"{stack}, layers across, kinds of tensors down", "".join(rows) + axis)
        + "".join(map(frame.note, notes))
    )


def _outside(found: list[Cell], steps: Sequence[float]) -> str:
    """Draw one square for each tensor that belongs to no layer."""
    if not found:
        return ""
    rows = "".join(_row(_short(cell.name, 56), _square(cell, "", 0, 0, steps)) for cell in found[:_MOST])
    cut = frame.note(f"{len(found) - _MOST} more tensors are not drawn") if len(found) > _MOST else ""
    return f"<h3>outside the layers</h3>{_figure('tensors outside the layers', rows)}{cut}"


def _figure(label: str, rows: str) -> str:
    """Return rows as a figure that is read with the arrow keys."""
    named = frame.text(f"Map of {label}. Arrow keys read the squares.", 200)
    return (
        f"<figure data-cells='1'><div class='map' tabindex='0' role='group' aria-roledescription='map' "
        f"aria-label='{named}'>{rows}</div><output aria-live='polite'></output></figure>"
    )


def _row(name: str, squares: str) -> str:
    """Return a row: a name, and its squares."""
    return f"<div class='maprow'><span>{frame.text(name, 120)}</span><svg aria-hidden='true'>{squares}</svg></div>"


def _span(block: list[int]) -> str:
    """Return one layer or a range.

    >>> _span([3]), _span([3, 4, 5])
    ('3', '3 to 5')
    """
    return str(block[0]) if len(block) == 1 else f"{block[0]} to {block[-1]}"


def _square(cell: Cell, where: str, column: int, columns: int, steps: Sequence[float]) -> str:
    """Draw one square of so many across, or a lone one, with what it says."""
    mark, level = _BLANK.get(cell.severity, ""), cell.level_on(steps)
    place = f'x="{100 * column / columns:.3f}%" width="{100 / columns:.3f}%"' if columns else 'x="0" width="52"'
    middle = f"{100 * (column + 0.5) / columns:.3f}%" if columns else "26"
    few = " few" if columns <= 8 else ""
    word = ""
    if mark and columns <= _WORDY and cell.code:
        place_of_word = f'x="{middle}" y="15.5" text-anchor="middle"'
        word = f'<text class="code {level}{few}" {place_of_word}>{frame.text(cell.code, 4)}</text>'
    box = f'<rect class="{level} {mark}" {place} y="1" height="21" rx="2"/>'
    return f"<g><title>{frame.text(where + cell.told, 600)}</title>{box}{word}</g>"


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


def legend(what: str, steps: Sequence[float] = _STEPS) -> str:
    """Say what the colours mean."""
    ends = [f"{step:.0e}".replace("e-0", "e-") if step < 0.002 else f"{step:g}" for step in steps[1:]]
    words = ("0, equal", *(f"≤ {end}" for end in ends), f"> {ends[-1]}")
    squares = [_key(f"d{i}", word) for i, word in enumerate(words)]
    extra = [_key("dx", "missing, or no number"), _key("du", "not compared")]
    return f"<p class='legend'><b>{frame.text(what)}</b> {' '.join([*squares, *extra])}</p>"


def _key(level: str, word: str) -> str:
    """Return a square of the legend with its word."""
    return (
        f'<span><svg width="14" height="14" aria-hidden="true"><path class="{level}" d="M1,1h12v12h-12z"/></svg>'
        f"{frame.text(word)}</span>"
    )


def layers_table(found: Mapping[str, Cell]) -> str:
    """Return a table of the layers of which something is to be told: how many tensors, which findings, how far."""
    rows = []
    for stack, grid in stacks(found)[0].items():
        layers: dict[int, list[Cell]] = {}
        for (_, layer), cells in grid.items():
            layers.setdefault(layer, []).extend(cell for cell in cells if cell.weight > (0, 0.0))
        for layer, told in sorted(layers.items()):
            if told:
                codes = ", ".join(sorted({cell.code for cell in told if cell.code}))
                worst = max(told, key=lambda c: c.weight)
                figure = "" if worst.relative is None else f"{worst.relative:.3g}"
                rows.append([f"{_short(stack)}.{layer}", len(told), codes, _short(worst.name, 80), figure])
    more = frame.note(f"{len(rows) - _MOST} more layers are not listed") if len(rows) > _MOST else ""
    columns = ["layer", "tensors", "codes", "the worst", "its relative difference"]
    listed = frame.table("Layer by layer", columns, rows[:_MOST], names=True)
    return frame.folded(f"Layer by layer ({len(rows)} layers)", listed + more) if rows else ""


def figures_table(found: Iterable[Cell], what: str = "relative difference") -> str:
    """Return the figures as a table, worst first, for readers without the picture."""
    rows = sorted((c for c in found if c.weight > (0, 0.0)), key=lambda c: c.weight, reverse=True)
    if not rows:
        return ""
    lines = [
        [c.name, _WORDS.get(c.status, c.status), "" if c.relative is None else f"{c.relative:.3g}", c.code]
        for c in rows[:_MOST]
    ]
    more = frame.note(f"{len(rows) - _MOST:,} more are not listed") if len(rows) > _MOST else ""
    listed = frame.table("Tensor by tensor", ["tensor", "status", what, "code"], lines, right=2, names=True)
    return frame.folded(f"The figures as a table ({len(rows):,} tensors)", listed + more)
