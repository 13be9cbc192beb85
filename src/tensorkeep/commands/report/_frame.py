"""The frame of every page: head, style, script, links to its sections; and the parts that several pages are made of.

A page is one file that asks nothing of the network. Its policy lets the one script run whose digest it names, so that
nothing else would run even where a name came through unescaped. What is escaped here: every text that is given.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

from tensorkeep.errors import printable
from tensorkeep.storage.overwriting import PAGE
from tensorkeep.storage.placement import replacing, write_bytes

_HERE = Path(__file__).parent


class Section(NamedTuple):
    """A part of a page.

    Args:
        title: its heading, which is escaped here.
        body: its HTML.
    """

    title: str
    body: str


@cache
def _asset(name: str) -> str:
    """Return a file that goes into every page."""
    return (_HERE / name).read_text(encoding="utf-8")


def page(title: str, head: str, sections: Sequence[Section], by: str = "report") -> str:
    """Return a whole page.

    Args:
        title: of the window and of the page.
        head: HTML below the title.
        sections: parts with a heading each; those without a body are left out.
        by: the command that writes it.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    there = [part for part in sections if part.body]
    links = "".join(f'<li><a href="#s{n}">{text(part.title, 100)}</a></li>' for n, part in enumerate(there))
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(there) > 2 else ""
    body = "".join(
        f'<section aria-labelledby="s{n}"><h2 id="s{n}">{text(part.title, 100)}</h2>{part.body}</section>'
        for n, part in enumerate(there)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title, 200)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{_asset('page.css')}</style></head><body><a class='skip' href='#main'>To the content</a>"
        f"<header class='bar'>{head}{nav}</header><main id='main' tabindex='-1'>{body}</main>"
        f"<footer><p>Written by tensorkeep {by}. Nothing on this page is loaded from elsewhere.</p></footer>"
        f"<script>{script}</script></body></html>\n"
    )


def write(made: str, out: str | Path, overwrite: bool = False) -> None:
    """Write a page whole or not at all.

    Args:
        made: the page.
        out: the file.
        overwrite: whether an earlier page of ours may be replaced.
    """
    with replacing(Path(out), overwrite, PAGE) as temporary:
        write_bytes(temporary, made.encode("utf-8", "backslashreplace"))


def top(title: str, beside: str = "", facts: Sequence[tuple[str, str]] = (), said: str = "") -> str:
    """Return a page's head: its title, the button for the colours, what the page found, and a list of facts.

    Args:
        title: the heading.
        beside: HTML right of it.
        facts: names and HTML.
        said: what was found, in a sentence or two: the first thing that is read.
    """
    found = f"<p class='said'>{text(said, 600)}</p>" if said else ""
    button = "<button type='button' id='theme' hidden>Colours</button>"
    return f"<div class='top'><h1>{text(title, 200)}</h1>{beside}{button}</div>{found}{listed(facts)}"


def listed(facts: Sequence[tuple[str, str]]) -> str:
    """Return names and HTML as a list of facts; nothing where there are none."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{body}</dd>" for name, body in facts)
    return f"<dl>{rows}</dl>" if rows else ""


def text(value: object, most: int = 400) -> str:
    """Return a text of a file as HTML: one line, cut, escaped."""
    return escape(printable(str(value), most))


def code(value: object, most: int = 400) -> str:
    """Return a path or a command as HTML."""
    return f"<code>{text(value, most)}</code>"


def note(value: object, most: int = 600) -> str:
    """Return a line of small print."""
    return f"<p class='note'>{text(value, most)}</p>"


def tiles(figures: Iterable[tuple[object, str]]) -> str:
    """Return figures in a row, each (value, what it is)."""
    body = "".join(f"<div><b>{text(value, 40)}</b><span>{text(name, 80)}</span></div>" for value, name in figures)
    return f"<div class='tiles'>{body}</div>" if body else ""


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: int = 1, names: bool = False
) -> str:
    """Return a table that can be scrolled sideways with the keyboard too.

    Args:
        caption: what it shows, for those who hear the page.
        columns: headings.
        rows: cells, which are escaped; the first of a row is its heading.
        right: columns from this one on are numbers, right-aligned.
        names: whether the first column has names of tensors.
    """
    kind = [" class='name'" if names and n == 0 else " class='num'" if n >= right else "" for n in range(len(columns))]
    head = "".join(f"<th scope='col'{kind[n] if n else ''}>{text(name, 80)}</th>" for n, name in enumerate(columns))
    lines = []
    for row in rows:
        first, *rest = (text(cell, 300) for cell in row)
        first = first.replace(".", ".<wbr>") if names else first  # a long name is broken at its dots
        cells = "".join(f"<td{kind[n]}>{cell}</td>" for n, cell in enumerate(rest, 1))
        lines.append(f"<tr><th scope='row'{kind[0]}>{first}</th>{cells}</tr>")
    if not lines:
        return ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return scroll(caption, body)


def scroll(label: str, body: str) -> str:
    """Return what may be wider than the page, in a part that is scrolled with the keyboard too."""
    return f"<div class='scroll' tabindex='0' role='group' aria-label='{text(label, 120)}'>{body}</div>"


def folded(title: str, body: str) -> str:
    """Return HTML behind a click; nothing where there is none."""
    return f"<details><summary>{text(title, 200)}</summary>{body}</details>" if body else ""


def figure(value: object) -> str:
    """Return a number of a file as people read it, a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        return "-"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1 << 63 else "-"
    return "0" if value == 0 else f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.3e}"
