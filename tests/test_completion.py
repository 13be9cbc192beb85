"""The shells' own programs take the scripts of `tensorkeep completion`, and complete with them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tensorkeep.cli import COMMANDS, ENDS, USERS, main
from tests.tools import ROOT

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shell -> the file with its script."""
    import contextlib
    import io

    made = {}
    for shell in SHELLS:
        made[shell] = tmp_path_factory.mktemp("scripts") / shell
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["completion", shell]) == 0
        made[shell].write_text(said.getvalue())
    return made


def completed(script: Path, words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last of these words."""
    told = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tensorkeep; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", told, "bash", script, "tensorkeep", *words],
        capture_output=True, text=True, cwd=folder, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_script(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    assert all(word in text for command in COMMANDS for word in command.split()) and "--quantize-backbone" in text
    assert not re.search(r"\{(?:formats|namings|loaders|targets)\}", text)
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", scripts[shell]], check=True)


def test_bash_completes_commands_flags_and_their_values(scripts: dict[str, Path], tmp_path: Path) -> None:
    script = scripts["bash"]
    assert completed(script, ["conv"], tmp_path) == ["convert"]
    assert sorted(completed(script, ["train", ""], tmp_path)) == ["detection", "language"]
    assert completed(script, ["convert", "a", "b", "--dry"], tmp_path) == ["--dry-run"]
    assert sorted(completed(script, ["merge", "a", "b", "c", "--to-bits", ""], tmp_path)) == [
        "fp4",
        "int8",
        "mxfp4",
        "nf4",
        "q4_0",
        "q4_k",
    ]
    assert sorted(completed(script, ["completion", ""], tmp_path)) == sorted(SHELLS)


def test_file_names_are_completed_where_a_path_stands(scripts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "my model.safetensors").touch()
    assert completed(scripts["bash"], ["inspect", "my"], tmp_path) == []  # so bash's own completion of files answers
    shown = ["bash", "--norc", "-c", 'source "$1"; complete -p tensorkeep', "bash", scripts["bash"]]
    said = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["complete", "-o", "default", "-F", "_tensorkeep", "tensorkeep"]
    assert "compgen -f" not in scripts["bash"].read_text()
    zsh = scripts["zsh"].read_text()
    assert "'1:A file, a folder, a Hub model id or a URL.:_files'" in zsh
    assert not re.search(r"^ +'\d+:[^:]*'( \\)?$", zsh, re.MULTILINE)


def test_help_is_grouped_by_what_a_user_wants(capsys: pytest.CaptureFixture[str]) -> None:
    grouped = [name for names in USERS.values() for name in names]
    assert sorted(grouped) == sorted({command.split()[0] for command in COMMANDS})
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    parts = re.findall(r"^╭─ (.*?) ─+╮\n(.*?)^╰", shown, re.MULTILINE | re.DOTALL)
    assert [title for title, _ in parts] == [*USERS, "Flags"]
    for title, body in parts[:-1]:
        assert sorted(re.findall(r"^│ (\w+) ", body, re.MULTILINE)) == sorted(USERS[title])


@pytest.mark.parametrize("words", [[], ["inspect"], ["train"], ["train", "detection"], ["explain"]])
def test_every_help_ends_with_the_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    assert " ".join(capsys.readouterr().out.split()).endswith(ENDS)


def test_the_exit_codes_of_the_help_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    listed = {code for row in re.findall(r"^\| (\d[\d, ]*) \|", page, re.MULTILINE) for code in re.findall(r"\d+", row)}
    told = set(re.findall(r"(?<=[ ;] )\d+|(?<=: )\d+", ENDS))
    assert told <= listed and {"0", "1", "2", "3", "75", "130"} == told


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "wanted"), [("tensorkeep conv", {"convert"}), ("tensorkeep train ", {"detection", "language"})]
)
def test_fish_completes_commands(line: str, wanted: set[str], scripts: dict[str, Path], tmp_path: Path) -> None:
    told = ["fish", "--no-config", "-c", f"source {scripts['fish']}; complete -C '{line}'"]
    done = subprocess.run(told, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert {offered.partition("\t")[0] for offered in done.stdout.splitlines()} >= wanted and done.stderr == ""
