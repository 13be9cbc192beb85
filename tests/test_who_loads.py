"""Where we say "proven: loads in X", X loads it: bitwise, and with nothing to say. Where we refuse, it would not."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tensorkeep.cli import main
from tests.who_loads import ROWS, SOURCES, Row, Source, made, tried

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("sources")
    return cache(lambda name: made(name, place / name.replace(" ", "-")))


def converted(
    source: Source, sink: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any], str]:
    """The exit code, the document and the errors of one conversion."""
    capsys.readouterr()
    code = main(["convert", str(source.folder), str(sink), *words.split(), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if code == 0 else {}, said.err


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.words} {row.name}")
def test_what_is_proven_loads_and_what_is_refused_does_not(
    row: Row, name: str, sources: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sink = sources(name), tmp_path / row.name
    code, document, said = converted(source, sink, row.words, capsys)
    print(code, document.get("proof"), said)
    if code == 0:
        assert tried(row, sink, source) == [] or document["proof"]["target"] is None
        return
    assert code == 2 and not list(tmp_path.iterdir())
    plain = tmp_path / "plain" / row.name
    plain.parent.mkdir()
    code, document, said = converted(source, plain, row.undeclared or row.words, capsys)
    assert code == 2 or (document["proof"]["target"] is None and tried(row, plain, source) != [])
