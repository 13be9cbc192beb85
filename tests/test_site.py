"""The site of the pages, as far as it is seen without MkDocs: every page has its place, every link leads to one."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tensorkeep
from tests.tools import ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / SITE["hooks"][0])))


def places(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from places(entry)


def test_every_page_is_in_the_navigation_once(hooks: SimpleNamespace) -> None:
    found = list(places(hooks.with_folders(SITE["nav"])))
    assert sorted(found) == sorted([*(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")), *hooks.MADE])


def test_every_link_of_a_page_leads_to_a_page_of_the_site_or_to_the_projects_source(hooks: SimpleNamespace) -> None:
    outside = {hooks.ELSEWHERE + p.relative_to(ROOT).as_posix() for p in hooks.elsewhere()}
    there = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*") if p.suffix in hooks.SHOWN} | outside
    assert {"repository/README.md", "repository/benchmarks/results/detectors.svg"} <= outside
    source = SITE["extra"]["source"]
    for place in sorted(p for p in there if p.endswith(".md")):
        inside = not place.startswith(hooks.ELSEWHERE)
        text = (DOCS / place if inside else ROOT / place.removeprefix(hooks.ELSEWHERE)).read_text()
        page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
        moved = hooks.FENCE.sub("", hooks.on_page_markdown(text, page, {"extra": {"source": source}}, None))
        for link in hooks.LINK.findall(moved):
            path = link.partition("#")[0]
            if link.startswith(f"{source}/"):
                named = re.fullmatch(r"(?:tree|blob)/main/(.+)", path.removeprefix(f"{source}/"))
                assert named and (ROOT / named[1]).exists(), (place, link)
            elif path and "://" not in link:
                at = (Path("/") / place).parent / path
                assert Path(*[part for part in resolved(at) if part != "/"]).as_posix() in there, (place, link)


def resolved(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return parts


def test_code_of_a_page_is_left_as_it_is(hooks: SimpleNamespace) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = "[x](../README.md)\n\n```text\n[x](../README.md)\n```\n\n[y](../src/tensorkeep/cli.py#L1) [z](https://e.org/a)\n"
    moved = hooks.on_page_markdown(text, page, SITE, None)
    assert moved == text.replace("../README.md", "repository/README.md", 1).replace(
        "../src/", f"{SITE['extra']['source']}/blob/main/src/"
    )


def test_the_reference_has_every_public_name_and_every_section_of_a_recipe(hooks: SimpleNamespace) -> None:
    python = hooks.python()
    for name in tensorkeep.__all__:
        assert name == "__version__" or re.search(rf"^::: tensorkeep\.[\w.]+\.{name}$", python, re.MULTILINE)
    fields = hooks.fields()
    for module, section in (("training.sections", "TrainingConfig"), ("language.recipe", "LanguageRecipe")):
        assert f"::: tensorkeep.{module}.{section}\n" in fields
    assert "::: tensorkeep.detection.recipe.schema.DetectionRecipe\n" in fields


def test_the_site_asks_nothing_of_the_network(hooks: SimpleNamespace) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    fine = '<a href="https://e.org">e</a><script src="assets/a.js"></script><img src="../b.svg">'
    assert hooks.on_post_page(fine, page, SITE) == fine
    for asking in (
        '<script src="https://e.org/a.js">',
        "<img alt=x src='//e.org/b.png'>",
        "<link href=http://e.org/c>",
    ):
        with pytest.raises(SystemExit, match=r"index\.md would load"):
            hooks.on_post_page(fine + asking, page, SITE)
    assert SITE["theme"]["font"] is False and "repo_url" not in SITE and "offline" in SITE["plugins"]
    (shim,) = SITE["extra"]["polyfills"]  # the search's, which Material would load from a CDN
    assert "IFrameWorker" in (DOCS / shim).read_text() and "Permission is hereby granted" in (DOCS / shim).read_text()


def test_a_warning_ends_the_build() -> None:
    (build,) = re.findall(r"mkdocs build .*", (ROOT / "Makefile").read_text())
    assert "--strict" in build and not {"--quiet", "-q"} & set(build.partition("#")[0].split())
    assert set(SITE["validation"].values()) == {"warn"}
