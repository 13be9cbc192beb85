"""The man page says what the help says, and the programs that show such pages read it without a complaint."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess

import pytest

from tensorkeep.cli import COMMANDS
from tests.tools import ROOT

PAGE = ROOT / "docs" / "tensorkeep.1"


def test_the_man_page_is_the_help() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "write_man.py"))["page"]()
    assert PAGE.read_text() == made, "run: python docs/write_man.py"
    called = re.findall(r"^\.B tensorkeep (.+)$", made, re.MULTILINE)
    assert sorted(called) == sorted(COMMANDS)
    for word in (".SH EXIT STATUS", ".SH ENVIRONMENT", ".SH FILES", ".B \\-\\-to\\-bits", ".B 75\n"):
        assert word in made, word


def test_groff_reads_it_without_a_warning() -> None:
    if not shutil.which("groff"):
        pytest.skip("groff is not installed: apt-get install groff")
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-b", PAGE], capture_output=True, text=True)
    if "can't open macro file" in done.stderr or "cannot load" in done.stderr:
        pytest.skip("groff's own macros are not installed: apt-get install groff")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "train language" in re.sub(r"\x1b\[[\d;]*m|.\x08", "", done.stdout)


def test_mandoc_finds_nothing_but_the_date_that_is_not_there_yet() -> None:
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed: apt-get install mandoc")
    done = subprocess.run(["mandoc", "-Tlint", PAGE], capture_output=True, text=True)
    found = (done.stdout + done.stderr).splitlines()
    assert [line for line in found if "missing date" not in line] == []
