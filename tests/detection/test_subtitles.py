import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorkeep.detection.results.subtitles import Cue, NamedDetection, best_rows, make_cues, to_srt, to_webvtt

SECONDS = st.integers(0, 400_000).map(lambda ms: ms / 1000)
LABELS = st.text(max_size=12) | st.sampled_from(["a --> b", "<i>x</i>", "\n\n7\n00:00:01,000", "{\\an8}", "&amp;"])
ROWS = st.lists(st.builds(NamedDetection, SECONDS, SECONDS, LABELS, st.floats(0, 1)), max_size=12)
WEBVTT = re.compile(r"(\d+):(\d\d):(\d\d)\.(\d{3}) --> (\d+):(\d\d):(\d\d)\.(\d{3}) line:(-\d+)\n(.+)")
SUBRIP = re.compile(r"(\d+)\n(\d+):(\d\d):(\d\d),(\d{3}) --> (\d+):(\d\d):(\d\d),(\d{3})\n(.+)", re.DOTALL)


def moment(hours: str, minutes: str, seconds: str, rest: str) -> int:
    assert int(minutes) < 60 and int(seconds) < 60
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(rest)


def blocks(text: str) -> list[str]:
    r"""As a reader takes a file apart: lines end at \n, an empty line ends a block."""
    return [block.strip("\n") for block in re.split(r"\n{2,}", text) if block.strip("\n")]


def from_webvtt(text: str) -> list[Cue]:
    head, *rest = blocks(text)
    assert head == "WEBVTT"
    cues = []
    for block in rest:
        found = WEBVTT.fullmatch(block)
        assert found is not None and not set("<>") & set(found[10]), block
        said = found[10].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        cues.append(Cue(moment(*found.groups()[:4]), moment(*found.groups()[4:8]), -1 - int(found[9]), said))
    return cues


def from_srt(text: str) -> list[tuple[int, int, list[str]]]:
    cues = []
    for number, block in enumerate(blocks(text), 1):
        found = SUBRIP.fullmatch(block)
        assert found is not None and int(found[1]) == number and "-->" not in found[10], block
        cues.append((moment(*found.groups()[1:5]), moment(*found.groups()[5:9]), found[10].split("\n")))
    return cues


@given(ROWS)
def test_webvtt_holds_every_cue_to_the_millisecond(rows: list[NamedDetection]) -> None:
    cues = make_cues(rows)
    assert from_webvtt(to_webvtt(cues)) == cues


@given(ROWS)
def test_subrip_shows_at_every_moment_what_goes_on_then(rows: list[NamedDetection]) -> None:
    cues = make_cues(rows)
    parsed = from_srt(to_srt(cues))
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(parsed)), "cues overlap"
    for at in sorted({edge for cue in cues for edge in (cue.start, cue.end - 1, cue.end)}):
        shown = [line for start, end, lines in parsed if start <= at < end for line in lines]
        going = sorted((cue for cue in cues if cue.start <= at < cue.end), key=lambda cue: -cue.line)
        assert shown == [cue.text.replace("-->", "→") for cue in going]


@given(ROWS, st.integers(1, 4))
def test_a_line_shows_one_detection_at_a_time_and_the_best_have_the_choice(
    rows: list[NamedDetection], lines: int
) -> None:
    cues = make_cues(rows, lines)
    assert all(0 <= cue.line < lines and cue.start < cue.end for cue in cues)
    for one in cues:
        assert not any(one is not o and one.line == o.line and o.start < one.end and one.start < o.end for o in cues)
    ranked = sorted(rows, key=lambda row: -row.score)
    for count in range(len(ranked)):  # what is shown of the better ones does not depend on the worse ones
        assert set(make_cues(ranked[:count], lines)) <= set(cues)


def test_one_detection_after_another_shares_a_line_and_the_worst_of_a_crowd_is_left_out() -> None:
    rows = [
        NamedDetection(0, 4, "a", 0.9),
        NamedDetection(4, 6, "b", 0.8),
        NamedDetection(3.999, 5, "c", 0.7),
        NamedDetection(1, 5, "d", 0.6),
    ]
    assert [(cue.text[0], cue.line) for cue in make_cues(rows, lines=2)] == [("a", 0), ("c", 1), ("b", 0)]


@given(ROWS)
def test_where_lines_suffice_no_detection_is_left_out(rows: list[NamedDetection]) -> None:
    wanted = sorted(
        (round(r.start * 1000), round(r.end * 1000)) for r in rows if round(r.start * 1000) < round(r.end * 1000)
    )
    assert sorted((cue.start, cue.end) for cue in make_cues(rows, lines=len(rows) + 1)) == wanted


@given(ROWS, st.floats(0, 1), st.integers(1, 5))
def test_the_best_rows_are_above_the_score_and_no_other_is_better(
    rows: list[NamedDetection], least: float, top: int
) -> None:
    kept = best_rows(rows, least, top)
    assert [row.start for row in kept] == sorted(row.start for row in kept)
    scores = sorted((row.score for row in rows if row.score >= least), reverse=True)
    assert sorted((row.score for row in kept), reverse=True) == scores[:top]


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_ffmpeg_reads_the_same_times(kind: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    cues = make_cues(
        [
            NamedDetection(0.5, 2.25, "dive", 0.9),
            NamedDetection(3.0, 4.001, "a <b> & c", 0.5),
            NamedDetection(3601.0, 3602.5, "late", 0.7),
        ]
    )
    path = tmp_path / f"x.{kind}"
    path.write_text(to_srt(cues) if kind == "srt" else to_webvtt(cues), encoding="utf-8")
    with av.open(str(path)) as container:
        stream = container.streams.subtitles[0]
        base = stream.time_base
        found = [(p.pts * base * 1000, (p.pts + p.duration) * base * 1000) for p in container.demux(stream) if p.size]
    assert found == [(cue.start, cue.end) for cue in cues]
