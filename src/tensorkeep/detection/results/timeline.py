"""How the timeline of a video is cut into lines, which pictures stand above it, and how its times are written.

A long video wraps like lines of text: each line shows an equal part of it, so a short action stays wide enough to be
seen and nothing has to be scrolled sideways. `tensorkeep.commands.report` draws it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorkeep.detection.data.opening import import_av

STRIP = 54  # pixels: the height of a thumbnail
ROWS = 24  # most lines of the picture before they cover longer parts
_LENGTHS = (60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)  # seconds of a line
CELLS = 10  # thumbnails of a line


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
    cell = row_seconds(duration) / CELLS
    return [(number + 0.5) * cell for number in range(int(duration / cell + 0.5))]


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
