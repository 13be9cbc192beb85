"""The pages under docs/ say what the program says."""

from __future__ import annotations

import runpy

from tests.tools import ROOT


def test_the_pages_of_the_codes_are_the_docstrings_of_the_checks() -> None:
    wanted = runpy.run_path(str(ROOT / "docs" / "write_codes.py"))["pages"]()
    found = {p.name: p.read_text() for p in (ROOT / "docs" / "codes").glob("*.md")}
    assert found == wanted, "run: python docs/write_codes.py"
