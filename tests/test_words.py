"""What the commands print is what tests/words/ says: `make words` writes those files again after a change of words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tensorkeep.cli import COMMANDS
from tests.tools import ROOT
from tests.word_cases import CASES, DOCUMENTS, WORDS, Printed, printed

PAGE = ROOT / "docs" / "reference" / "exit-codes.md"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Printed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return printed(tmp_path_factory.mktemp("words"))


def cases(told: Printed) -> list[str]:
    return [case for text in told.words.values() for case in text.split("$ tensorkeep ")[1:]]


@pytest.mark.parametrize("command", sorted(CASES))
def test_a_command_prints_its_words(command: str, told: Printed) -> None:
    assert told.words[command] == (WORDS / f"{command}.txt").read_text(encoding="utf-8"), (
        "changed on purpose: make words"
    )


def test_every_file_of_words_is_a_command_that_runs() -> None:
    assert {path.stem for path in WORDS.glob("*.txt")} == set(CASES)


def test_every_command_has_a_case_that_succeeds_and_one_that_is_refused(told: Printed) -> None:
    for command in COMMANDS:
        ended = {case.rpartition("--- exit ")[2].strip() for case in cases(told) if re.match(rf"{command}[ \n]", case)}
        assert "0" in ended, command
        assert "2" in ended or command in ("doctor", "recipe list"), command  # these take no words


def test_a_refusal_is_an_error_and_a_hint_on_stderr_alone(told: Printed) -> None:
    for case in cases(told):
        if "--- exit 2" in case:
            assert "error: " in case and "hint: " in case and "--- stdout" not in case, case
        assert "Traceback" not in case


def keys(document: dict[str, Any]) -> set[str]:
    """The document's keys, and those of its objects with a dot."""
    nested = {f"{k}.{inner}" for k, value in document.items() if isinstance(value, dict) for inner in value}
    return set(document) - {"schema"} | nested


@pytest.mark.parametrize("command", sorted(DOCUMENTS))
def test_a_document_has_the_keys_of_the_page(command: str, told: Printed) -> None:
    table = PAGE.read_text("utf-8").partition("## Keys of every document")[2]
    rows = {
        left.replace("`", "").strip(): set(re.findall("`([^`]+)`", right))
        for left, right in re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)
    }
    named, found = rows[command], keys(json.loads(told.documents[command]))
    opened = {key.partition(".")[0] for key in named if "." in key}
    assert named == {key for key in found if "." not in key or key.partition(".")[0] in opened}


def test_the_page_has_every_command() -> None:
    named = PAGE.read_text("utf-8").partition("## Keys of every document")[2]
    assert not [
        c
        for c in COMMANDS
        if f"| `{c.removesuffix(' language').removesuffix(' detection')}" not in named and c != "completion"
    ]
