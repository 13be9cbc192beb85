"""What the commands print is what tests/words/ says: `make words` writes those files again after a change of words."""

from __future__ import annotations

import pytest

from tests.word_cases import CASES, WORDS, written


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return written(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("command", sorted(CASES))
def test_a_command_prints_its_words(command: str, printed: dict[str, str]) -> None:
    assert printed[command] == (WORDS / f"{command}.txt").read_text(encoding="utf-8"), "changed on purpose: make words"


def test_every_file_of_words_is_a_command_that_runs() -> None:
    assert {path.stem for path in WORDS.glob("*.txt")} == set(CASES)


def test_no_refusal_is_without_a_hint(printed: dict[str, str]) -> None:
    for text in printed.values():
        for case in text.split("$ tensorkeep ")[1:]:
            assert "--- exit 2" not in case or ("error: " in case and "hint: " in case), case
