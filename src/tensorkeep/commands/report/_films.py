"""Draw what was found in a video: frames, below them a lane for each class with true segments over found ones.

A long video takes several rows, each an equal part of it. Everything is as wide as there is room; names and times keep
their size, and a lane's name stands above it where there is little room.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import NamedTuple

from tensorkeep.commands.report import _frame as frame
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.detection.results.timeline import clock, row_seconds

_BAR, _LANES, _ROWS = 12, 24, 200  # pixels of a segment; lanes of a row, and segments of a table
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)


class Part(NamedTuple):
    """The part of a video that one row of the picture shows.

    Attributes:
        low: seconds at which it begins.
        high: seconds at which it ends.
        length: seconds of a whole row.
        last: whether what lies past the end is shown at its edge.
    """

    low: float
    high: float
    length: float
    last: bool

    def holds(self, row: NamedDetection) -> bool:
        """Whether any of a segment lies in this part."""
        return (self.last or row.start < self.high) and (row.end > self.low or self.low <= row.start)

    def at(self, seconds: float) -> float:
        """Return the place of a moment in percent of the width."""
        return 100 * (min(max(seconds, self.low), self.high) - self.low) / self.length


def film(
    name: str,
    seconds: float,
    found: Sequence[NamedDetection],
    true: Sequence[NamedDetection],
    pictures: Sequence[tuple[float, bytes]],
) -> str:
    """Return a figure of one video, and a table of its segments.

    Args:
        name: of the video.
        seconds: its length.
        found: what a detector found.
        true: what is annotated.
        pictures: small frames, each (seconds, JPEG file).
    """
    length = row_seconds(seconds)
    rows = max(math.ceil(seconds / length), 1)
    ordered = [*sorted(true, key=lambda r: r.start), *sorted(found, key=lambda r: r.start)]
    labels = list(dict.fromkeys(row.label for row in ordered))
    body = []
    for number in range(rows):
        last = number + 1 == rows
        part = Part(number * length, max(seconds, 1e-3) if last else (number + 1) * length, length, last)
        busy = {row.label for row in ordered if part.holds(row)}
        lanes = [label for label in labels if label in busy or len(labels) <= 6]
        drawn = "".join(_lane(label, part, found, true) for label in lanes[:_LANES])
        more = frame.note(f"{len(lanes) - _LANES} more classes are not drawn") if len(lanes) > _LANES else ""
        body.append(f"<div class='film'>{_strip(part, pictures)}{drawn}{_axis(part)}{more}</div>")
    label = frame.text(f"Segments of {name} over time. Arrow keys read them.", 200)
    return (
        f"<figure data-cells='1'><div tabindex='0' role='group' aria-roledescription='timeline' aria-label='{label}'>"
        f"{''.join(body)}</div><output aria-live='polite'></output></figure>{_table(name, found, true)}"
    )


def key(with_true: bool) -> str:
    """Return what the colours of the segments mean.

    Args:
        with_true: whether annotated segments are drawn.
    """
    kinds = [("t", "annotated")] if with_true else []
    kinds.append(("p", "found, the stronger the better its score"))
    shown = "".join(
        f'<span><svg width="18" height="12" aria-hidden="true"><path class="{kind}" d="M0,0h18v12h-18z"/></svg>'
        f"{said}</span>"
        for kind, said in kinds
    )
    return f"<p class='legend'>{shown}</p>"


def _strip(part: Part, pictures: Sequence[tuple[float, bytes]]) -> str:
    """Return the frames of one row."""
    own = [p for p in pictures if part.low <= p[0] < part.high]
    images = "".join(
        f'<img alt="frame at {clock(seconds)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        for seconds, data in own
    )
    return f"<div class='lane'><span></span><div class='strip'>{images}</div></div>" if images else ""


def _axis(part: Part) -> str:
    """Return the times below a row."""
    step = next((s for s in _TICKS if part.length / s <= 6), part.length)
    marks = []
    for number in range(math.ceil(part.low / step - 1e-9), int(part.high / step + 1e-9) + 1):
        at, time = part.at(number * step), clock(number * step)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        time = time if step < 1 else time[:-3]
        marks.append(f'<text x="{at:.2f}%" y="12" text-anchor="{anchor}">{time}</text>')
    return f"<div class='lane'><span></span><svg height='16' aria-hidden='true'>{''.join(marks)}</svg></div>"


def _lane(label: str, part: Part, found: Sequence[NamedDetection], true: Sequence[NamedDetection]) -> str:
    """Draw one class in one row: true segments on top, below them found ones, apart where they overlap."""
    layers = [("t", layer) for layer in _layers(true, label, part) or ([[]] if true else [])]
    layers += [("p", layer) for layer in _layers(found, label, part)]
    height = max(len(layers), 1) * (_BAR + 2)
    shapes = [f'<rect class="back" width="{part.at(part.high):.2f}%" height="{height}"/>']
    for number, (kind, layer) in enumerate(layers):
        for row in layer:
            start, end = part.at(row.start), part.at(row.end)
            said = "true" if kind == "t" else f"score {row.score:.2f}"
            strength = "" if kind == "t" else f' fill-opacity="{0.3 + 0.7 * min(max(row.score, 0.0), 1.0):.2f}"'
            told = f"{row.label}, {said}, {clock(row.start)} to {clock(row.end)} ({row.end - row.start:.2f} s)"
            place = f'x="{start:.2f}%" width="{max(end - start, 0.3):.2f}%" y="{number * (_BAR + 2) + 1}"{strength}'
            shapes.append(
                f'<g><title>{frame.text(told)}</title><rect class="{kind}" {place} height="{_BAR}" rx="2"/></g>'
            )
    name = f"<span>{frame.text(label, 60)}</span>"
    return f"<div class='lane'>{name}<svg height='{height}' aria-hidden='true'>{''.join(shapes)}</svg></div>"


def _layers(rows: Sequence[NamedDetection], label: str, part: Part) -> list[list[NamedDetection]]:
    """Put a class's segments into as few layers as keep them apart, in order of their starts."""
    layers: list[list[NamedDetection]] = []
    own = (row for row in rows if row.label == label and part.holds(row))
    for row in sorted(own, key=lambda r: (r.start, r.end)):
        fitting = next((layer for layer in layers if layer[-1].end <= row.start), None)
        if fitting is None:
            layers.append([row])
        else:
            fitting.append(row)
    return layers[:12]


def _table(name: str, found: Sequence[NamedDetection], true: Sequence[NamedDetection]) -> str:
    """List the segments of a video."""
    listed = [("true", row, "") for row in true] + [("found", row, f"{row.score:.3f}") for row in found]
    listed.sort(key=lambda item: (item[1].start, item[1].end))
    rows = [[clock(row.start), clock(row.end), row.label, kind, score] for kind, row, score in listed[:_ROWS]]
    more = frame.note(f"{len(listed) - _ROWS} more are not listed") if len(listed) > _ROWS else ""
    body = frame.table(f"Segments of {name}", ["from", "to", "class", "what", "score"], rows, 4) + more
    return frame.folded(f"The segments as a table ({len(listed)})", body)
