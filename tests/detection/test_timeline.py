"""The timeline of a video: every segment where its times put it, none over another, pictures above their time."""

import base64
import io
import re
from html import unescape

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.commands.report._films import film
from tensorkeep.commands.report.video import video_page
from tensorkeep.detection.results import timeline as module
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.detection.results.timeline import jpeg, picture_times, row_seconds
from tests.test_report import is_harmless

DURATIONS = st.floats(0.04, 200_000) | st.sampled_from([119.99, 120.0, 120.01, 240.0, 1800.0])
SEGMENT = re.compile(r'<title>([^<]*)</title><rect class="([tp])" x="([\d.]+)%" width="([\d.]+)%" y="(\d+)"')
Drawn = tuple[float, float, int, str]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[float, list[NamedDetection], list[NamedDetection]]:
    duration = draw(DURATIONS)
    share = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])

    def row() -> NamedDetection:
        start, end = sorted((draw(share) * duration, draw(share) * duration))
        return NamedDetection(
            start, end, draw(st.sampled_from(["dive", "jump <b>", "é & \x00", "x" * 40])), draw(st.floats(0, 1))
        )

    return duration, [row() for _ in range(draw(st.integers(0, 6)))], [row() for _ in range(draw(st.integers(0, 3)))]


def rectangles(drawn: str, kind: str) -> list[tuple[int, Drawn]]:
    """Of each segment the lane it is in, and x and width in percent, y in pixels, what it says."""
    return [
        (lane, (float(x), float(width), int(y), unescape(said)))
        for lane, part in enumerate(drawn.split("<div class='lane'>"))
        for said, which, x, width, y in SEGMENT.findall(part)
        if which == kind
    ]


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_every_segment_lies_where_its_times_put_it(
    scene: tuple[float, list[NamedDetection], list[NamedDetection]],
) -> None:
    duration, rows, true = scene
    shown, length = film("v", duration, rows, true, []), row_seconds(duration)
    count = max(int(-(-duration // length)), 1)
    for kind, given_rows in (("p", rows), ("t", true)):
        expected = []
        for row in given_rows:
            parts = [
                k
                for k in range(count)
                if row.start < (k + 1) * length and (row.end > k * length or row.start >= k * length)
            ]
            for k in parts or [count - 1]:  # at the very end: the edge of the last row
                low, high = k * length, min((k + 1) * length, duration)
                start, end = (100 * (min(max(s, low), high) - low) / length for s in (row.start, row.end))
                expected.append((float(f"{start:.2f}"), float(f"{max(end - start, 0.3):.2f}")))
        assert sorted((x, width) for _, (x, width, _, _) in rectangles(shown, kind)) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_segments_never_cover_one_another(scene: tuple[float, list[NamedDetection], list[NamedDetection]]) -> None:
    duration, rows, true = scene
    shown = film("v", duration, rows, true, [])
    drawn = [r for kind in "pt" for r in rectangles(shown, kind)]
    for i, (lane, (x, width, y, _)) in enumerate(drawn):
        for other, (other_x, other_width, other_y, _) in drawn[i + 1 :]:
            apart = lane != other or abs(y - other_y) >= 12
            assert apart or x + width <= other_x + 0.32 or other_x + other_width <= x + 0.32  # the least width shows


def test_hovering_tells_class_score_and_time() -> None:
    rows, true = [NamedDetection(7.25, 9.5, "high <jump>", 0.874)], [NamedDetection(7, 9, "high <jump>", 1.0)]
    shown = film("v", 60, rows, true, [])
    assert rectangles(shown, "p")[0][1][3] == "high <jump>, score 0.87, 0:07.25 to 0:09.50 (2.25 s)"
    assert rectangles(shown, "t")[0][1][3] == "high <jump>, true, 0:07.00 to 0:09.00 (2.00 s)"


@given(DURATIONS)
def test_a_picture_of_any_length_has_few_rows_and_thumbnails(duration: float) -> None:
    times = picture_times(duration)
    assert -(-duration // row_seconds(duration)) <= module.ROWS
    assert len(times) <= module.ROWS * 10 and all(0 <= s <= duration for s in times)
    assert times or duration < row_seconds(duration)


def test_thumbnails_come_in_the_order_of_their_times_ten_a_line() -> None:
    pytest.importorskip("av")
    times = picture_times(300)
    pictures = [(s, jpeg(np.full((3, 90, 160), int(s) % 256, np.uint8))) for s in times]
    lines = re.findall(r"<div class='strip'>(.*?)</div>", film("v", 300, [], [], pictures))
    assert [line.count("<img ") for line in lines] == [10, 10, 5]
    found = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)", "".join(lines))]
    assert found == [data for _, data in pictures]


@pytest.mark.parametrize("shape", [(90, 160), (51, 67), (160, 90), (5, 900)])
def test_a_thumbnail_is_the_picture_made_small(shape: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    ramp = np.linspace(0, 255, shape[1]).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (shape[0], 1)), *[np.full(shape, 40, np.uint8)] * 2])
    with av.open(io.BytesIO(jpeg(picture)), format="jpeg_pipe") as container:
        read = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert read.shape == (module.STRIP, round(shape[1] * module.STRIP / shape[0]), 3)
    wanted = np.interp((np.arange(read.shape[1]) + 0.5) / read.shape[1], (np.arange(shape[1]) + 0.5) / shape[1], ramp)
    assert np.abs(read[module.STRIP // 2, :, 0] - wanted).mean() < 12
    assert np.abs(read[..., 1].astype(float) - 40).mean() < 12


def test_a_page_loads_nothing_and_says_what_was_found() -> None:
    bad = '"><script>alert(1)</script>\x1b'
    rows = [NamedDetection(1, 2, bad, 0.5), NamedDetection(3, 4, "dive", 0.5), NamedDetection(3, 4.2, "dive", 0.4)]
    text = video_page(
        bad, 10, rows, [NamedDetection(3, 4, "dive", 1.0), rows[0]._replace(label="dive")], [], [("a", bad)]
    )
    is_harmless(text)
    assert "\x1b" not in text and "default-src 'none'" in text
    assert "3 segments found in 10 s: 2 dive, 1 " in text
    assert "1 of 2 annotated segments are found (tIoU 0.5 or more)." in text
    assert "Nothing was found above the score" in video_page("v", 10, [])
