"""What the site adds to the pages of docs/: those that they link to elsewhere in the repository, and three made here.

MkDocs calls the functions that begin with `on_` (mkdocs.yml, `make docs`). The Markdown stays as it works in the
repository; a link out of docs/ leads to a page below repository/ on the site, or to the project's source.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = "repository/"  # where pages from outside docs/ lie on the site
SHOWN = (".md", ".svg", ".png", ".webp")  # a part of the site; other files are linked at the address of the source
FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
ASKS = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|href|data)=["']?(?:\w+:)?//[^>]*>"""
)
FIELDS = {
    "Both kinds": "tensorkeep.training.sections",
    "Language": "tensorkeep.language.recipe",
    "Detection": "tensorkeep.detection.recipe.schema",
    "The detector": "tensorkeep.detection.model.config",
}


def on_config(config: Any) -> Any:
    """Put every page of a folder where the navigation names the folder; make anchors as the repository shows them."""
    from pymdownx.slugs import slugify

    config["mdx_configs"]["toc"]["slugify"] = slugify(case="lower")
    config["nav"] = with_folders(config["nav"])
    return config


def with_folders(nav: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The navigation with the pages of the folders that it names.

    Args:
        nav: as mkdocs.yml has it.

    Returns:
        The same, a folder's pages in its place.
    """
    return [
        {title: in_folder(DOCS / place, place) if str(place).endswith("/") else place for title, place in entry.items()}
        for entry in nav
    ]


def in_folder(folder: Path, place: str) -> list[str | dict[str, str]]:
    """The pages of a folder under short titles, its index first."""
    pages = sorted(page for page in folder.glob("*.md") if page.name != "README.md")
    titles = [page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(":")[0] for page in pages]
    return [f"{place}README.md", *({title: f"{place}{page.name}"} for title, page in zip(titles, pages, strict=True))]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here, and those that pages link to outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for path in elsewhere():
        place = ELSEWHERE + path.relative_to(ROOT).as_posix()
        made = File.generated(config, place, content=path.read_bytes())
        made.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(made)
    return files


def elsewhere() -> list[Path]:
    """The pages and pictures outside docs/ that can be reached from its pages."""
    seen, open_ = set(), list(DOCS.rglob("*.md"))
    while open_:
        page = open_.pop()
        if page in seen or page.suffix not in SHOWN:
            continue
        seen.add(page)
        if page.suffix == ".md":
            text = FENCE.sub("", page.read_text(encoding="utf-8"))
            links = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
            open_ += [(page.parent / link).resolve() for link in links if link]
    return sorted(page for page in seen if not page.is_relative_to(DOCS))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let a page's links lead where their files are on the site."""
    place = page.file.src_uri
    at = ROOT / place.removeprefix(ELSEWHERE) if place.startswith(ELSEWHERE) else DOCS / place
    parts = FENCE.split(markdown)
    return "".join(
        part if FENCE.fullmatch(part) else LINK.sub(lambda m: f"]({moved(m[1], at, place, config)})", part)
        for part in parts
    )


def moved(link: str, at: Path, place: str, config: Any) -> str:
    """A link of a page as it is on the site.

    Args:
        link: as it stands in the Markdown.
        at: the page's file.
        place: the page on the site.
        config: of MkDocs; `extra.source` is the project's address.

    Returns:
        A relative link to a page of the site, or an address of the project's source.
    """
    path, mark, anchor = link.partition("#")
    if "://" in link or not path:
        return link
    target = (at.parent / path).resolve()
    if target.is_relative_to(DOCS) and target.suffix in SHOWN:
        there = target.relative_to(DOCS).as_posix()
    elif target.suffix in SHOWN:
        there = ELSEWHERE + target.relative_to(ROOT).as_posix()
    else:
        kind = "tree" if target.is_dir() else "blob"
        return f"{config['extra']['source']}/{kind}/main/{target.relative_to(ROOT).as_posix()}{mark}{anchor}"
    return os.path.relpath(there, Path(place).parent) + mark + anchor


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Name the search for those who hear the page; refuse one that would ask something of the network."""
    if found := ASKS.search(output):
        raise SystemExit(f"error: {page.file.src_uri} would load something from the network: {found[0]}")
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def commands() -> str:
    """Every command's own help."""
    from tensorkeep.cli import COMMANDS

    words = [[], *(command.split() for command in sorted(COMMANDS))]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tensorkeep", *command, "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80", "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in words
    ]
    page = ["# Commands\n\nWhat each says with `--help`. [Exit codes and JSON](exit-codes.md) are the same for all.\n"]
    for command, process in zip(words, running, strict=True):
        text, _ = process.communicate()
        if process.returncode or not text.startswith("Usage: "):
            raise SystemExit(f"error: tensorkeep {' '.join(command)} --help ended with {process.returncode}")
        page.append(f"## {' '.join(['tensorkeep', *command])}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(page)


def python() -> str:
    """The public names of the package, whose docstrings mkdocstrings reads."""
    import tensorkeep

    names = sorted((n for n in tensorkeep.__all__ if n != "__version__"), key=lambda n: (n[0].isupper(), n))
    head = "# Python\n\n`import tensorkeep as tk` loads neither torch nor numpy; a name is imported at its first use.\n"
    where = [f"::: {tensorkeep._WHERE[name]}.{name}\n" for name in names]
    return "\n".join([head, *where])


def fields() -> str:
    """The sections of recipes: their dataclasses, in the order of the source."""
    head = "# Fields of a recipe\n\n[Recipes](recipes.md) says how they are written and set;"
    page = [f"{head} `tensorkeep train language RECIPE --print-recipe` prints them with their defaults.\n"]
    for title, module in FIELDS.items():
        tree = ast.parse((ROOT / "src" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        sections = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]
        page.append(f"## {title}\n")
        page += [f"::: {module}.{name}\n    options: {{heading_level: 3, members: false}}\n" for name in sections]
    return "\n".join(page)


MADE: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/python.md": python,
    "reference/fields.md": fields,
}
