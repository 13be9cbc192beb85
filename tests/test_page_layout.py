"""Every kind of page in a real browser: nothing is wider than a phone, every picture has a name, nothing complains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tensorkeep.commands.report import differences, merged
from tensorkeep.commands.report.compare import compare_page
from tensorkeep.commands.report.diagnosis import page as diagnosis_page
from tensorkeep.commands.report.run import run_page
from tensorkeep.commands.report.scored import scored_page
from tensorkeep.commands.report.video import video_page
from tensorkeep.detection.results.subtitles import NamedDetection
from tests.browser.chromium import Tab, browser, program
from tests.detection.test_run_page import make_run
from tests.test_report import document, finding

LONG = "a_rather_long_name_without_any_place_to_break_it_" * 3
WIDER = """[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, svg, .skip')
  && e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((e) => e.outerHTML.slice(0, 120))"""
NAMELESS = """[...document.querySelectorAll('svg, canvas, img')].filter((e) => !(e.getAttribute('alt') ||
  e.getAttribute('aria-label') || (e.getAttribute('aria-hidden') && e.closest('[aria-label], .legend, .runs, label'))
  )).slice(0, 5).map((e) => e.outerHTML.slice(0, 120))"""
SAID = "(document.querySelector('.said, .verdict, .causes') || {}).textContent || ''"

pytestmark = pytest.mark.skipif(program() is None, reason="needs Chromium")


def tensors(status: str = "values") -> list[dict[str, object]]:
    return [
        {"name": f"model.{LONG}.layers.{n}.q_proj.weight", "status": status, "relative_difference": 0.1 * n}
        for n in range(1, 40)
    ]


def compared(folder: Path) -> str:
    return compare_page([make_run(folder / name, scale=scale) for name, scale in ((LONG, 1.0), ("two", 1.1))])


def timeline(_: Path) -> str:
    rows = [NamedDetection(n, n + 3.0, LONG if n % 2 else "dive", 0.5) for n in range(50)]
    return video_page(LONG, 60.0, rows, rows[:5], [], [("video", LONG)])


def scored(_: Path) -> str:
    errors = {"tiou": 0.5, "gains": {"background": 0.2}, "classes": [{"label": LONG, "segments": 4, "missed": 1}]}
    found = {"AP": {LONG: [0.5] * 10}, "mAP": [0.5] * 10, "tiou": [n / 10 for n in range(10)], "average_mAP": 0.5}
    return scored_page({**found, "errors": errors}, Path(LONG))


PAGES: dict[str, Callable[[Path], str]] = {
    "run": lambda folder: run_page(make_run(folder / LONG)),
    "compare": compared,
    "diff": lambda _: differences.page({"a": LONG, "b": "b", "tensors": tensors()}),
    "diagnosis": lambda _: diagnosis_page(
        document(verdict="findings", causes=["V06"], findings=[finding("V06", [LONG])], tensors=tensors())
    ),
    "merge": lambda _: merged.page({"sink": LONG, "tensors": 40, "merged": [{**t, "change": 0.1} for t in tensors()]}),
    "scored": scored,
    "timeline": timeline,
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_fits_a_phone_names_its_pictures_and_begins_with_what_it_found(
    kind: str, tab: Tab, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGES[kind](tmp_path), encoding="utf-8")
    for width in (375, 1280):
        tab.open(page, width, "light")
        assert tab.run(WIDER) == [] and not tab.run("document.documentElement.scrollWidth > innerWidth"), width
        assert tab.run(NAMELESS) == []
        assert tab.run(SAID).strip()
        assert tab.complaints() == []
