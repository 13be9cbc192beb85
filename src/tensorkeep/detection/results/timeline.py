"""Draw a video's detections: thumbnails in a strip, below it a lane for each class, true segments over predicted ones.

A long video wraps like lines of text: each line of the picture shows an equal part of it, so a short action stays wide
enough to be seen and nothing has to be scrolled sideways. The result is one SVG, or a page around it that loads nothing
from anywhere; hovering over a segment tells its class, score and time.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.opening import import_av
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.errors import printable

LEFT, WIDTH, _RIGHT = 150, 1000, 14  # pixels: names of classes, a line's part of the video, margin
STRIP, BAR, _GAP, _AXIS = 54, 12, 4, 22  # heights: thumbnails, a segment, between lanes, times
ROWS = 24  # most lines of the picture before they cover longer parts
_LENGTHS = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)  # seconds of a line
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_CELLS = 10  # thumbnails of a line
_STEADY = 6  # up to so many classes have a lane in every line; of more, only those that occur in it

STYLE = """
.timeline { max-width: 100%; height: auto; font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
.timeline, .key { --ink: #0b0b0b; --muted: #6f6e69; --line: #d5d4cc; --shade: #80808018; }
.timeline, .key { --predicted: #1c5cab; --true: #2e7d32; }
@media (prefers-color-scheme: dark) {
  .timeline, .key { --ink: #fff; --muted: #9b9a93; --line: #3a3a38; --predicted: #6da7ec; --true: #6fce6f; }
}
.timeline text { fill: var(--ink); } .timeline .time { fill: var(--muted); font-size: 11px; }
.timeline .tick { stroke: var(--line); }
.timeline .lane { fill: var(--shade); } .timeline .p { fill: var(--predicted); } .timeline .t { fill: var(--true); }
.timeline .p:hover, .timeline .t:hover { stroke: var(--ink); stroke-width: 1.5; }
"""
_PAGE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 24px; font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; } h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
p { color: #6f6e69; margin: 4px 0 12px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: 2px 20px 2px 0; }
.swatch { display: inline-block; width: 18px; height: 10px; border-radius: 2px; margin: 0 4px 0 10px; }
"""


def row_seconds(duration: float) -> float:
    """Return the seconds that a line shows: all of a short video, else a round length that needs few lines.

    Args:
        duration: seconds of the video.

    Example:
        >>> row_seconds(42.5), row_seconds(1800), row_seconds(3 * 3600)
        (42.5, 120.0, 600.0)
    """
    if duration <= _LENGTHS[1]:
        return max(duration, 1e-3)
    fitting = (length for length in _LENGTHS[1:] if duration <= length * ROWS)
    return float(next(fitting, -(-duration // ROWS)))


def picture_times(duration: float) -> list[float]:
    """Return the seconds of which a timeline shows a thumbnail: the middles of equal parts of each line.

    Args:
        duration: seconds of the video.
    """
    cell = row_seconds(duration) / _CELLS
    return [(number + 0.5) * cell for number in range(int(duration / cell + 0.5))]


def place_of(seconds: float, duration: float) -> tuple[int, float]:
    """Return the line (from 0) and x in pixels of a moment; the end of a line is its right edge.

    Example:
        >>> place_of(132, 1800)
        (1, 250.0)
    """
    row = max(min(int(seconds / row_seconds(duration)), _rows(duration) - 1), 0)
    return row, _part(row, duration).x(seconds)


def timeline(
    duration: float,
    rows: Sequence[NamedDetection],
    true: Sequence[NamedDetection] = (),
    pictures: Iterable[tuple[float, bytes]] = (),
) -> str:
    """Draw a video's detections as SVG text.

    A segment that goes on in the next line of the picture is drawn in both. The stronger the colour, the better the
    score.

    Args:
        duration: seconds of the video.
        rows: what was found.
        true: annotated segments; their score is not shown.
        pictures: thumbnails, each (seconds, JPEG file).

    Returns:
        An `<svg>` element with its own style sheet.
    """
    labels, held = _labels(rows, true), list(pictures)
    parts, y = [], 4.0
    for number in range(_rows(duration)):
        drawn, height = _row(number, duration, labels, rows, true, held, y)
        parts += drawn
        y += height
    width, box = LEFT + WIDTH + _RIGHT, f"{y:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" width="{width}" height="{box}" '
        f'viewBox="0 0 {width} {box}" role="img" aria-label="predicted segments over time"><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>"
    )


def page(title: str, facts: str, picture: str, rows: Sequence[NamedDetection], with_true: bool = False) -> str:
    """Return an HTML page around a timeline that loads nothing from anywhere.

    Args:
        title: heading.
        facts: a sentence below it.
        picture: what `timeline` gives.
        rows: detections, listed in a table.
        with_true: whether the picture shows annotated segments too.
    """
    cells = ((clock(row.start), clock(row.end), _text(row.label), f"{row.score:.3f}") for row in rows)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    table = (
        f"<table><tr><th>from</th><th>to</th><th>class</th><th>score</th></tr>{body}</table>"
        if rows
        else "<p>Nothing was found above the score.</p>"
    )
    key = '<span class="swatch" style="background:var(--predicted)"></span>predicted'
    key += '<span class="swatch" style="background:var(--true)"></span>true' if with_true else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(title)}</title><style>{_PAGE}</style></head>"
        f'<body><main><h1>{_text(title)}</h1><p>{_text(facts)}</p><p class="key">{key}</p>{picture}'
        f"<details open><summary>{len(rows)} detections</summary>{table}</details></main></body></html>\n"
    )


def jpeg(picture: NDArray[np.uint8], height: int = STRIP) -> bytes:
    """Return a picture, scaled, as a JPEG file.

    Args:
        picture: RGB, uint8 [3, H, W].
        height: pixels of the result; its width keeps the proportions.
    """
    av: Any = import_av()
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.transpose(1, 2, 0)), format="rgb24")
    width = max(round(frame.width * height / frame.height), 1)
    frame = frame.reformat(width=width, height=height, format="yuvj420p", interpolation="AREA")
    frame.pts = 0
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "yuvj420p", Fraction(1, 25)
    encoder.thread_count = 1
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))


def clock(seconds: float) -> str:
    """Write seconds as `[H:]M:SS` with hundredths.

    Args:
        seconds: the time.

    Returns:
        The text.

    Example:
        >>> clock(7.25), clock(3723.04)
        ('0:07.25', '1:02:03.04')
    """
    hundredths = round(seconds * 100)
    whole, rest = divmod(hundredths, 100)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{whole % 60:02}.{rest:02}"


def _rows(duration: float) -> int:
    """Return the number of lines of the picture."""
    return max(int(-(-duration // row_seconds(duration))), 1)


def _labels(rows: Sequence[NamedDetection], true: Sequence[NamedDetection]) -> list[str]:
    """Return the classes in the order of their first appearance, annotated ones first."""
    ordered = [*sorted(true, key=lambda row: row.start), *sorted(rows, key=lambda row: row.start)]
    return list(dict.fromkeys(row.label for row in ordered))


class _Part(NamedTuple):
    """The part of the video that a line of the picture shows.

    Attributes:
        low: seconds at which it begins.
        high: seconds at which it ends.
        until: equal to `high`, but infinite in the last line, at whose edge stays what is annotated past the end.
        length: seconds of a whole line.
    """

    low: float
    high: float
    until: float
    length: float

    def x(self, seconds: float) -> float:
        """Return the place of a moment in pixels."""
        return LEFT + (min(max(seconds, self.low), self.high) - self.low) / self.length * WIDTH

    def holds(self, row: NamedDetection) -> bool:
        """Return whether any of a detection lies in this part."""
        return row.start < self.until and (row.end > self.low or self.low <= row.start)


def _part(number: int, duration: float) -> _Part:
    """Return the part of the video that line `number` shows."""
    length, last = row_seconds(duration), number + 1 == _rows(duration)
    low = number * length
    return _Part(low, max(duration, 1e-3) if last else low + length, math.inf if last else low + length, length)


def _row(
    number: int,
    duration: float,
    labels: Sequence[str],
    rows: Sequence[NamedDetection],
    true: Sequence[NamedDetection],
    pictures: Sequence[tuple[float, bytes]],
    top: float,
) -> tuple[list[str], float]:
    """Draw one line of the picture: its elements and its height in pixels."""
    part = _part(number, duration)
    strip = [_image(part, seconds, data, top) for seconds, data in pictures if part.low <= seconds < part.until]
    first = y = top + (STRIP + _GAP if strip else 0)
    lanes: list[str] = []
    busy = {given.label for given in (*rows, *true) if part.holds(given)}
    for label in labels if len(labels) <= _STEADY else [label for label in labels if label in busy]:
        lane, height = _lane(label, part, rows, true, y)
        lanes += lane
        y += height
    return strip + _axis(part, first, y) + lanes, y + _AXIS - top


def _image(part: _Part, seconds: float, data: bytes, top: float) -> str:
    """Draw one thumbnail."""
    cell = WIDTH / _CELLS
    at = LEFT + int((part.x(seconds) - LEFT) / cell) * cell
    href = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return (
        f'<image x="{at:.1f}" y="{top:.1f}" width="{cell - 2:.1f}" height="{STRIP}" '
        f'preserveAspectRatio="xMidYMid slice" href="{href}"><title>{clock(seconds)}</title></image>'
    )


def _axis(part: _Part, top: float, bottom: float) -> list[str]:
    """Draw the ticks of one line and their times."""
    step = next((step for step in _TICKS if part.length / step <= 12), part.length)
    marks = []
    for number in range(math.ceil(part.low / step - 1e-9), int(part.high / step + 1e-9) + 1):
        at, time = part.x(number * step), clock(number * step)
        time = time if step < 1 else time[:-3]
        marks.append(
            f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<text class="time" x="{at:.1f}" y="{bottom + 13:.1f}" text-anchor="middle">{time}</text>'
        )
    return marks


def _lane(
    label: str, part: _Part, rows: Sequence[NamedDetection], true: Sequence[NamedDetection], top: float
) -> tuple[list[str], float]:
    """Draw one class in one line of the picture: true segments on top, below them predicted ones in layers."""
    layers = [("t", layer) for layer in _layered(true, label, part) or ([[]] if true else [])]
    layers += [("p", layer) for layer in _layered(rows, label, part)]
    height = max(len(layers), 1) * (BAR + 2)
    parts = [
        f'<rect class="lane" x="{LEFT}" y="{top:.1f}" width="{part.x(part.high) - LEFT:.1f}" height="{height}"/>'
        f'<text x="{LEFT - 8}" y="{top + BAR - 1:.1f}" text-anchor="end">{_short(label)}'
        f"<title>{_text(label)}</title></text>"
    ]
    for number, (kind, layer) in enumerate(layers):
        for row in layer:
            start, end = part.x(row.start), part.x(row.end)
            said = "true" if kind == "t" else f"{row.score:.2f}"
            strength = "" if kind == "t" else f' fill-opacity="{0.25 + 0.75 * min(max(row.score, 0.0), 1.0):.2f}"'
            parts.append(
                f'<rect class="{kind}" x="{start:.2f}" y="{top + number * (BAR + 2) + 1:.1f}" '
                f'width="{max(end - start, 1.5):.2f}" height="{BAR}" rx="2"{strength}><title>{_text(label)} · {said} · '
                f"{clock(row.start)} to {clock(row.end)} ({row.end - row.start:.2f} s)</title></rect>"
            )
    return parts, height + _GAP


def _layered(rows: Sequence[NamedDetection], label: str, part: _Part) -> list[list[NamedDetection]]:
    """Put a class's segments of one line into as few layers as keep them apart, in order of their starts."""
    layers: list[list[NamedDetection]] = []
    shown = (row for row in rows if row.label == label and part.holds(row))
    for row in sorted(shown, key=lambda row: (row.start, row.end)):
        fitting = next((layer for layer in layers if layer[-1].end <= row.start), None)
        if fitting is None:
            layers.append([row])
        else:
            fitting.append(row)
    return layers


def _text(text: str) -> str:
    """Make a file's or a class's name safe to stand in a page."""
    return escape(printable(text))


def _short(label: str) -> str:
    """Shorten a class name to 20 characters."""
    return _text(label if len(label) <= 20 else label[:19] + "…")
