"""Draw curves as wide as there is room: a plane that stretches, numbers that do not, a table of the same figures.

The line goes through the means of blocks of steps; a band shows what lies between the least and the greatest value.
The values are in the element's `data-lines` for the script, which shows them under the pointer and for arrow keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tensorkeep.commands.report import _frame as frame
from tensorkeep.commands.report._series import Block, Series

WIDTH, HEIGHT = 1000, 200  # of the plane's own measure; it is stretched to the room there is
COLOURS, DASHES = 8, 3
_ROWS = 60  # of a table beside a picture


class Line(NamedTuple):
    """One curve.

    Attributes:
        label: what it is called.
        series: its values.
        number: which colour and dashes it has, and what hides it.
    """

    label: str
    series: Series
    number: int = 0


class Mark(NamedTuple):
    """A step at which something happened.

    Attributes:
        step: when.
        said: what.
    """

    step: int
    said: str


def curves(
    title: str,
    lines: Sequence[Line],
    *,
    marks: Sequence[Mark] = (),
    best: tuple[int, float] | None = None,
    small: bool = False,
    x: str = "step",
) -> str:
    """Return a figure with curves over steps, and their table.

    Args:
        title: what is drawn.
        lines: the curves.
        marks: vertical lines.
        best: a point to point out.
        small: whether it is lower than usual.
        x: what goes to the right.
    """
    drawn = [line for line in lines if line.series.blocks]
    if not drawn:
        return f"<figure><figcaption>{frame.text(title)}</figcaption>{frame.note('no value was noted')}</figure>"
    plane = _Plane.around([block for line in drawn for block in line.series.blocks])
    picture = "".join(_line(line, plane, len(drawn)) for line in drawn)
    picture += "".join(
        f'<line class="mark" x1="{plane.x(m.step):.1f}" x2="{plane.x(m.step):.1f}" y1="0" y2="{HEIGHT}">'
        f"<title>{frame.text(m.said)}</title></line>"
        for m in marks
        if plane.first <= m.step <= plane.last
    )
    if best is not None:
        picture += f'<path class="best" d="M{plane.x(best[0]):.1f},{plane.y(best[1]):.1f}h0"/>'
    kind = " small" if small else ""
    ys = "".join(
        f'<text x="100%" dx="-7" y="{100 * plane.y(v) / HEIGHT:.2f}%" dy="4" text-anchor="end">{tick_text(v)}</text>'
        for v in plane.ticks
    )
    grid = "".join(f'<line x1="0" x2="{WIDTH}" y1="{plane.y(v):.1f}" y2="{plane.y(v):.1f}"/>' for v in plane.ticks)
    label = frame.text(f"{title} over the {x}s. Arrow keys read the values.", 200)
    return (
        f"<figure data-lines='{_data(drawn)}' data-steps='[{plane.first},{plane.last}]' data-x='{escape(x)}'>"
        f"<figcaption>{frame.text(title)}</figcaption>"
        f"<div class='plane{kind}' tabindex='0' role='group' aria-roledescription='chart' aria-label='{label}'>"
        f'<svg class="ys" aria-hidden="true">{ys}</svg><svg class="draw" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" aria-hidden="true">{grid}{picture}'
        f'<line class="cursor hidden" x1="0" x2="0" y1="0" y2="{HEIGHT}"/></svg>'
        f'<svg class="xs" aria-hidden="true">{_steps(plane, x)}</svg></div>'
        f"<output aria-live='polite'></output>{_table(title, drawn, x)}</figure>"
    )


def swatch(number: int) -> str:
    """Return a piece of a curve's line, for a legend."""
    return (
        f'<svg class="swatch" width="28" height="12" aria-hidden="true"><path class="{_style(number)}" '
        f'd="M1,6h26"/></svg>'
    )


def _style(number: int) -> str:
    """Return the classes of a curve: its colour and, where colours come again, its dashes."""
    dashes = number // COLOURS % DASHES
    return f"c{number % COLOURS}{f' dash{dashes}' if dashes else ''}"


class _Plane(NamedTuple):
    """What steps and values the plane shows, and where the lines of its grid are."""

    first: float
    last: float
    low: float
    high: float
    ticks: Sequence[float]

    @classmethod
    def around(cls, blocks: Sequence[Block]) -> _Plane:
        """Return the plane that holds all blocks."""
        first, last = min(b.first for b in blocks), max(b.last for b in blocks)
        low, high = min(b.low for b in blocks), max(b.high for b in blocks)
        ticks = ticks_of(low, high)
        return cls(first, last, min(low, ticks[0]), max(high, ticks[-1]), ticks)

    def x(self, step: float) -> float:
        """Return the place of a step; a lone one is in the middle."""
        return (step - self.first) / (self.last - self.first) * WIDTH if self.last > self.first else WIDTH / 2

    def y(self, value: float) -> float:
        """Return the place of a value."""
        return (self.high - value) / (self.high - self.low) * HEIGHT


def ticks_of(low: float, high: float) -> list[float]:
    """Return three to six round numbers, of which the first and last are about as far apart as the values.

    >>> ticks_of(0.13, 2.9)
    [0.0, 1.0, 2.0, 3.0]
    """
    if high - low <= abs(high) * 1e-9:
        wide = abs(high) * 0.1 or 1.0
        low, high = low - wide, high + wide
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Return a number beside the plane in few letters.

    >>> tick_text(0.0), tick_text(2e-05), tick_text(12500.0), tick_text(3000000.0)
    ('0', '2e-5', '12,500', '3e6')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _steps(plane: _Plane, x: str) -> str:
    """Write the first, the middle and the last step below the plane, the first with what they count."""
    middle = (plane.first + plane.last) / 2
    marks = [(0, "start", plane.first), (50, "middle", middle), (100, "end", plane.last)]
    if plane.first == plane.last:
        marks = [(50, "middle", plane.first)]
    return "".join(
        f'<text x="{at}%" y="15" text-anchor="{anchor}">{x + " " if n == 0 else ""}{step:,.0f}</text>'
        for n, (at, anchor, step) in enumerate(marks)
        if step == int(step) or plane.last - plane.first > 100 or anchor != "middle"
    )


def _line(line: Line, plane: _Plane, lines: int) -> str:
    """Draw a curve: the band, the line through the means, and dots where there are few."""
    blocks, style = line.series.blocks, _style(line.number)
    parts = []
    if any(block.high > block.low for block in blocks):
        band = "band" if lines <= 2 else "band faint"
        upper = [f"{plane.x(b.middle):.1f},{plane.y(b.high):.1f}" for b in blocks]
        lower = [f"{plane.x(b.middle):.1f},{plane.y(b.low):.1f}" for b in reversed(blocks)]
        parts.append(f'<path class="{band} {style}" d="M{"L".join([*upper, *lower])}Z"/>')
    way = [f"{plane.x(b.middle):.1f},{plane.y(b.mean):.1f}" for b in blocks]
    parts.append(f'<path class="{style}" d="M{"L".join(way)}"/>')
    if len(blocks) <= 40:
        parts.append(f'<path class="dot {style.split()[0]}" d="{"".join(f"M{at}h0" for at in way)}"/>')
    return f'<g data-line="{line.number}">{"".join(parts)}</g>'


def _data(lines: Sequence[Line]) -> str:
    """Return the values as JSON for an attribute: step, mean and, of a block of several, least and greatest."""
    found: dict[int, dict[str, object]] = {}
    for line in lines:
        points = [
            [b.middle, _short(b.mean)] if b.count == 1 else [b.middle, _short(b.mean), _short(b.low), _short(b.high)]
            for b in line.series.blocks
        ]
        found[line.number] = {"label": line.label[:80], "points": points}
    rows = [found.get(n, {"label": "", "points": []}) for n in range(max(found) + 1)]
    return escape(json.dumps(rows, separators=(",", ":")))


def _short(value: float) -> float:
    """Return a value with six digits."""
    return float(f"{value:.6g}")


def _table(title: str, lines: Sequence[Line], x: str) -> str:
    """Return the figures of the curves as a table of at most 60 rows a curve."""
    parts = []
    for line in lines:
        blocks = line.series.blocks
        size = -(-len(blocks) // _ROWS)
        rows = []
        for start in range(0, len(blocks), size):
            part = blocks[start : start + size]
            count = sum(b.count for b in part)
            mean = sum(b.total for b in part) / count
            steps = f"{part[0].first:,}" + ("" if part[0].first == part[-1].last else f" to {part[-1].last:,}")
            least, most = min(b.low for b in part), max(b.high for b in part)
            rows.append([steps, frame.figure(mean), *([frame.figure(least), frame.figure(most)])])
        if all(row[1] == row[2] == row[3] for row in rows):
            columns, rows = [x, "value"], [row[:2] for row in rows]
        else:
            columns = [x, "mean", "least", "greatest"]
        named = f"{title}, {line.label}" if len(lines) > 1 else title
        heading = f"<p class='note'>{frame.text(line.label)}</p>" if len(lines) > 1 else ""
        parts.append(heading + frame.table(named, columns, rows))
    return frame.folded("The figures as a table", "".join(parts))
