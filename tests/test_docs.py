"""The pages say what the program says: codes, links, imports, paths of the source; and none grows too long."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import warnings
from pathlib import Path

import pytest

from tests.tools import ROOT

TOP = [ROOT / name for name in ("README.md", "README.zh.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_pages_of_the_codes_are_the_docstrings_of_the_checks() -> None:
    wanted = runpy.run_path(str(ROOT / "docs" / "write_codes.py"))["pages"]()
    found = {p.name: p.read_text() for p in (ROOT / "docs" / "codes").glob("*.md")}
    assert found == wanted, "run: python docs/write_codes.py"


def test_the_tables_of_formats_and_namings_are_the_program_s() -> None:
    writer = runpy.run_path(str(ROOT / "docs" / "write_codes.py"))
    page = writer["FORMATS"].read_text()
    assert page == writer["with_tables"](page), "run: python docs/write_codes.py"
    assert page.count("<!-- end -->") == 2


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(prose(page)):
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@each_page
def test_every_relative_link_and_anchor_of_a_page_resolves(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# One, two: `three`\n[x](b.md) [y](#one-two-three) [z](a.md#four) [w](https://e.org)"
    )
    assert dead_links(tmp_path / "a.md") == ["b.md", "a.md#four"]


def test_every_page_is_linked_from_the_map() -> None:
    seen, open_ = set(), [ROOT / "docs" / "index.md"]
    while open_:
        page = open_.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        open_ += [
            (page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(page)) if "://" not in link
        ]
    assert {page for page in PAGES if page not in seen} == set()


@each_page
def test_no_page_is_longer_than_a_reader_stays(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 250


@each_page
def test_every_import_and_dotted_name_of_a_page_works_under_the_path_it_has_now(page: Path) -> None:
    imports = [
        ast.unparse(node)
        for language, code in FENCE.findall(page.read_text())
        if language == "python"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom) and "tensorkeep" in ast.unparse(node)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for statement in imports:
            if "integrations.lightning" in statement:
                pytest.importorskip("pytorch_lightning")
            exec(statement, {})
        for dotted in re.findall(r"(?<![\w/.])tensorkeep(?:\.\w+)+", prose(page)):
            if dotted.rpartition(".")[2] not in ("json", "key"):  # the certificate's file
                found = importlib.import_module("tensorkeep")
                for part in dotted.split(".")[1:]:
                    if not hasattr(found, part):
                        importlib.import_module(f"{found.__name__}.{part}")
                    found = getattr(found, part)


@each_page
def test_every_path_of_the_source_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"(?<![\w/.-])(?:src|tests|benchmarks|examples|docs|recipes)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or path == "tests/test_x.py", path
    for module in re.findall(r"python3? -m ((?:benchmarks|tests)[\w.]*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for module in re.findall(r"`(benchmarks\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_no_page_and_no_recipe_speaks_in_riddles() -> None:
    recipes = [path for top in ("recipes", "src") for path in (ROOT / top).rglob("*.yaml")]
    assert len(recipes) > 15
    for place in [*PAGES, *recipes]:
        assert not re.search(r"[Tt]he seeds'|§|[Qq]uantis", place.read_text()), place


def test_every_claim_of_the_benchmarks_names_a_script_that_is_there() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    columns = [[cell.strip() for cell in row] for row in rows]
    columns = [row for row in columns if len(row) == 5]  # the journeys' table has other columns
    assert {tuple(row) for row in columns if row[0] == "claim"} == {("claim", "figure", "beside", "script", "date")}
    claims = [row for row in columns if row[0] != "claim" and not set(row[0]) <= set("-")]
    assert len(claims) > 40
    for claim, *_, script, _date in claims:
        named = re.findall(r"`(\w+)`", script)
        assert named and all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in named), claim
