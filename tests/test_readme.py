"""The README's commands give the README's output, word for word (seconds apart), in both languages."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tests.tools import ROOT

SECONDS = re.compile(r"\(\d+\.\d s\)")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_every_command_of_the_readme_prints_what_the_readme_shows(
    readme: str, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, told = [], []
    for block in blocks(ROOT / readme, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            told.append((command, SECONDS.sub("(s)", expected)))
            if command.startswith("tensorkeep "):
                main(shlex.split(command)[1:])
            else:
                subprocess.run(command, shell=True, check=True)
            shown.append((command, SECONDS.sub("(s)", capsys.readouterr().out)))
    assert len(shown) >= 8
    assert shown == told


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readmes_python_runs_and_finds_no_difference(readme: str, clone: Path) -> None:
    names: dict[str, object] = {}
    for code in blocks(ROOT / readme, "python"):
        exec(compile(code, readme, "exec"), names)
    assert names["differences"] == []


def test_the_map_of_the_source_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Map of the source") :]
    for name in re.findall(r"`([a-z_]+(?:\.py|/))`", table):
        assert (ROOT / "src" / "tensorkeep" / name).exists(), name
