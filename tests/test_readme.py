"""README and the weights guide show what their commands print, word for word but for seconds and versions."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tests.tools import ROOT

VARYING = re.compile(r"(?<=\()\d+\.\d(?= s\))|(?<=loads in transformers )[\d.]+")
WEIGHTS = ["docs/guides/weights.md", "docs/guides/weights.zh.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "least"), [("README.md", 3), ("README.zh.md", 3), *((page, 8) for page in WEIGHTS)])
def test_every_command_of_a_page_prints_what_the_page_shows(
    page: str, least: int, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, told = [], []
    for block in blocks(ROOT / page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            told.append((command, VARYING.sub("...", expected)))
            if command.startswith("tensorkeep "):
                main(shlex.split(command)[1:])
            else:
                subprocess.run(command, shell=True, check=True)
            shown.append((command, VARYING.sub("...", capsys.readouterr().out)))
    assert len(shown) >= least
    assert shown == told


@pytest.mark.parametrize("page", WEIGHTS)
def test_the_guides_python_runs_and_finds_no_difference(page: str, clone: Path) -> None:
    names: dict[str, object] = {}
    for code in blocks(ROOT / page, "python"):
        exec(compile(code, page, "exec"), names)
    assert names["differences"] == names["findings"] == names["repaired"] == []


@pytest.mark.parametrize("page", ["docs/concepts/views.md", "docs/concepts/plans.md"])
def test_the_python_of_a_concept_runs(page: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = blocks(ROOT / page, "python")
    for code in codes:
        exec(compile(code, page, "exec"), {})
    shown = capsys.readouterr().out
    assert codes and shown and "<bound method" not in shown


def test_the_readme_is_short_and_its_twin_has_the_same_commands() -> None:
    english, chinese = (ROOT / "README.md", ROOT / "README.zh.md")
    assert len(english.read_text().splitlines()) == len(chinese.read_text().splitlines()) <= 90
    assert blocks(english, "console") == blocks(chinese, "console")
    for mine, other in zip(blocks(english, "bash"), blocks(chinese, "bash"), strict=True):
        assert [shlex.split(line, comments=True) for line in mine.splitlines() if "<" not in line] == [
            shlex.split(line, comments=True) for line in other.splitlines() if "<" not in line
        ]


def test_the_map_of_the_source_names_all_rooms_and_what_the_contract_lets_them_import() -> None:
    lines = (ROOT / "docs/concepts/rooms.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    told = {
        row[0].strip("`/"): {w for w in row[3].split(", ") if w != "nothing"} for row in rows if row[0].endswith("/`")
    }
    source = ROOT / "src" / "tensorkeep"
    assert set(told) == {p.parent.name for p in source.glob("*/__init__.py")}
    (layers,) = re.findall(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    depth = {name: at for at, layer in enumerate(layers.splitlines()) for name in re.findall(r"\w+", layer)}
    assert told == {room: {other for other in told if depth[other] > depth[room]} for room in told}
