import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorkeep.detection.results import timeline as module
from tensorkeep.detection.results.subtitles import NamedDetection
from tensorkeep.detection.results.timeline import (
    LEFT,
    WIDTH,
    jpeg,
    page,
    picture_times,
    place_of,
    row_seconds,
    timeline,
)

SVG = "{http://www.w3.org/2000/svg}"
DURATIONS = st.floats(0.04, 200_000) | st.sampled_from([119.99, 120.0, 120.01, 240.0, 1800.0])


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


def rectangles(svg: str, kind: str) -> list[tuple[float, float, float, str]]:
    """x, width, y and what hovering tells, of each rectangle."""
    root = ElementTree.fromstring(svg)
    return [
        (float(r.attrib["x"]), float(r.attrib["width"]), float(r.attrib["y"]), str(r.findtext(f"{SVG}title")))
        for r in root.iter(f"{SVG}rect")
        if r.attrib["class"] == kind
    ]


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_every_segment_lies_where_its_times_put_it(
    scene: tuple[float, list[NamedDetection], list[NamedDetection]],
) -> None:
    duration, rows, true = scene
    svg, length = timeline(duration, rows, true), row_seconds(duration)
    expected = []
    for kind, given_rows in (("p", rows), ("t", true)):
        drawn = rectangles(svg, kind)
        for row in given_rows:
            count = int(-(-duration // length))
            parts = [
                k
                for k in range(count)
                if row.start < (k + 1) * length and (row.end > k * length or row.start >= k * length)
            ]
            for k in parts or [count - 1]:  # at the very end: the edge of the last row
                low, high = k * length, min((k + 1) * length, duration)
                start, end = (LEFT + (min(max(s, low), high) - low) / length * WIDTH for s in (row.start, row.end))
                expected.append((kind, float(f"{start:.2f}"), float(f"{max(end - start, 1.5):.2f}")))
        assert sorted((x, width) for x, width, _, _ in drawn) == sorted((x, w) for k, x, w in expected if k == kind)


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_segments_never_cover_one_another(scene: tuple[float, list[NamedDetection], list[NamedDetection]]) -> None:
    duration, rows, true = scene
    drawn = [r for kind in "pt" for r in rectangles(timeline(duration, rows, true), kind)]
    for i, (x, width, y, _) in enumerate(drawn):
        for other_x, other_width, other_y, _ in drawn[i + 1 :]:
            apart = abs(y - other_y) >= module.BAR
            assert apart or x + width <= other_x + 1.51 or other_x + other_width <= x + 1.51  # the least width shows


def test_hovering_tells_class_score_and_time() -> None:
    svg = timeline(60, [NamedDetection(7.25, 9.5, "high <jump>", 0.874)], [NamedDetection(7, 9, "high <jump>", 1.0)])
    assert rectangles(svg, "p")[0][3] == "high <jump> · 0.87 · 0:07.25 to 0:09.50 (2.25 s)"
    assert rectangles(svg, "t")[0][3] == "high <jump> · true · 0:07.00 to 0:09.00 (2.00 s)"


def test_a_moment_is_in_the_row_that_shows_it() -> None:
    assert place_of(0, 1800) == (0, LEFT)
    assert place_of(120, 1800) == (1, LEFT)
    assert place_of(1800, 1800) == (14, LEFT + WIDTH)
    assert place_of(30, 60) == (0, LEFT + WIDTH / 2)


@given(DURATIONS)
def test_a_picture_of_any_length_has_few_rows_and_thumbnails(duration: float) -> None:
    times = picture_times(duration)
    assert -(-duration // row_seconds(duration)) <= module.ROWS
    assert len(times) <= module.ROWS * 10 and all(0 <= s <= duration for s in times)
    assert times or duration < row_seconds(duration)


def test_thumbnails_stand_above_their_time() -> None:
    pytest.importorskip("av")
    times = picture_times(300)
    pictures = [(s, jpeg(np.full((3, 90, 160), int(s) % 256, np.uint8))) for s in times]
    root = ElementTree.fromstring(timeline(300, [], [], pictures))
    images = list(root.iter(f"{SVG}image"))
    assert len(images) == len(times) == 25
    for image, (seconds, data) in zip(images, pictures):
        x, width = float(image.attrib["x"]), float(image.attrib["width"])
        assert x <= place_of(seconds, 300)[1] <= x + width
        assert base64.b64decode(image.attrib["href"].partition(",")[2]) == data


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


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    bad = '"><script>alert(1)</script>\x1b'
    rows = [NamedDetection(1, 2, bad, 0.5)]
    text = page(bad, bad, timeline(10, rows, rows), rows, with_true=True)
    assert "<script" not in text and "\x1b" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)", text)
    assert "Nothing was found" in page("v", "", timeline(10, []), [])
