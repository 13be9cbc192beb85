"""What is printed commands no terminal, breaks no shell, and shows no password: one mouth for everything."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tensorkeep.cli import main
from tensorkeep.detection.results.subtitles import NamedDetection, make_cues, to_srt, to_webvtt
from tensorkeep.errors import TensorkeepError, masked, printable, visible, word
from tensorkeep.output import Output
from tests.hostile import CONTROL
from tests.samples import everything

_BAD = [chr(c) for c in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def _plain(text: str) -> bool:
    return not any(c in text for c in _BAD)


def test_control_and_direction_characters_are_spelled_out_and_texts_stay() -> None:
    text = "".join(_BAD) + "\ud800\u2028"
    for spelled in (printable(text), visible(text)):
        assert spelled.isprintable() and spelled.count("\\") >= len(_BAD)
    kept = "one\ntwo\tdrei\u3000四 été\xa0! 👩\u200d👩"
    assert visible(kept) == kept and "\n" not in printable(kept)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:hunter2@host:1/a b", "http://***@host:1/a b"),
        ("cannot open 's3://k:hunter2@b/x?X-Sig=hunter2'", "cannot open 's3://***@b/x?***'"),
        ("http:/user:hunter2@host/x", "http:/***@host/x"),  # as pathlib spells it
        ("s3://bucket/a@b.pth and gs://b/c", "s3://bucket/a@b.pth and gs://b/c"),
        ("C:/a?b", "C:/a?b"),
    ],
)
def test_user_names_passwords_and_queries_of_urls_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown and printable(text) == shown and visible(text) == shown


def test_everything_that_output_prints_is_masked_and_visible(capsys: pytest.CaptureFixture[str]) -> None:
    bad = f"ftp://u:hunter2@h/x?s=hunter2 {CONTROL}"
    out, machine = Output(), Output(json=True)
    out.line(bad)
    out.piece(bad)
    out.remark(bad)
    out.table(["a"], [[bad]])
    out.error(TensorkeepError(bad, where=bad, hint=bad))
    machine.error(TensorkeepError(bad, where=bad, hint=bad))
    machine.document({"a": [bad, {"b": Path("http://u:hunter2@h")}]})
    printed = capsys.readouterr()
    assert _plain(printed.out + printed.err) and "hunter2" not in printed.out + printed.err
    assert json.loads(printed.out.splitlines()[-1])["a"][0].startswith("ftp://***@h/x?***")


def test_subtitles_spell_out_what_is_in_a_label() -> None:
    rows = [NamedDetection(0.0, 1.0, f"jump {CONTROL}\n\nx", 0.5)]
    for text in (to_srt(make_cues(rows)), to_webvtt(make_cues(rows))):
        assert _plain(text) and "\\x1b[2J" in text


@pytest.mark.parametrize("name", ["a; touch owned", "$(touch owned)", "it's", "a\nb", "-x", "plain"])
def test_a_word_is_one_word_of_a_shell(name: str) -> None:
    assert shlex.split(word(name)) == [name if not name.startswith("-") else f"./{name}"]
    done = subprocess.run(["sh", "-c", f"printf %s {word(name)}"], capture_output=True, text=True, check=True)
    assert done.stdout.removeprefix("./") == name


def test_commands_in_findings_and_errors_quote_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "nest; touch owned"
    good = everything(tmp_path / "good")["single"]
    sick = everything(tmp_path / name)["dcp"]
    main(["diagnose", str(sick), "--reference", str(good)])
    main(["repair", str(good), str(tmp_path / "out"), "--reference", str(sick)])
    main(["generate", str(sick), "--prompt", "a"])
    printed = capsys.readouterr()
    lines = [x for x in (printed.out + printed.err).splitlines() if name in x and "tensorkeep " in x]
    commands = [line[line.index("tensorkeep ") :] for line in lines]
    assert commands
    for command in commands:
        assert str(sick) in shlex.split(command.replace("`", " ")), command
