"""Write what pages take from the program: docs/codes/ from the checks' docstrings, the tables of formats and namings.

python docs/write_codes.py          (a test holds pages and program equal)
"""

from __future__ import annotations

import re
from pathlib import Path

from tensorkeep.conversion import naming as namings
from tensorkeep.diagnosis.checks import CODES, explain, title
from tensorkeep.formats import table as formats

PAGES = Path(__file__).parent / "codes"
FORMATS = Path(__file__).parent / "reference" / "formats.md"


def pages() -> dict[str, str]:
    """Return every page by its file name, the index included."""
    out = {f"{code}.md": page(code) for code in CODES}
    rows = "\n".join(f"| [{code}]({code}.md) | {title(code)} |" for code in CODES)
    out["README.md"] = (
        "# Finding codes\n\nIn order of precedence. `tensorkeep explain CODE` prints the same pages.\n\n"
        f"| code | says |\n|---|---|\n{rows}\n"
    )
    return out


def page(code: str) -> str:
    """Return `explain CODE` as Markdown: the first line as the title, lines that are not indented as headings."""
    first, _, rest = explain(code).partition("\n")
    lines = [
        line[4:] if line.startswith("    ") else f"## {line}\n" if line else "" for line in rest.strip().splitlines()
    ]
    return "\n".join([f"# {first.rstrip('.')}", "", *lines]) + "\n"


def with_tables(text: str) -> str:
    """A page with what stands between `<!-- formats -->` (or `namings`) and `<!-- end -->` made anew."""
    made = {
        "formats": rows({word: formats.module(word).__doc__ for word in formats.FORMATS}, formats.writable()),
        "namings": rows({word: namings.module(word).__doc__ for word in namings.NAMINGS}, namings.writable()),
    }
    between = r"(<!-- (formats|namings) -->\n).*?(<!-- end -->)"
    return re.sub(between, lambda m: m[1] + made[m[2]] + m[3], text, flags=re.DOTALL)


def rows(docstrings: dict[str, str | None], written: list[str]) -> str:
    """A table of words, the first lines of their modules' docstrings, and whether they can be written."""
    lines = ["| word | what it is | written |", "|---|---|---|"]
    for word, docstring in docstrings.items():
        first = (docstring or "").partition("\n")[0].removeprefix(f"Naming `{word}`: ")
        first = re.sub(rf" \(`{word}`[^)]*\)", "", first)
        lines.append(f"| `{word}` | {first} | {'yes' if word in written else 'no'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (PAGES / name).write_text(text)
    FORMATS.write_text(with_tables(FORMATS.read_text()))
