"""Write docs/codes/: one page a finding code, from the check's own docstring (a test holds them equal).

python docs/write_codes.py
"""

from __future__ import annotations

from pathlib import Path

from tensorkeep.diagnosis.checks import CODES, explain, title

PAGES = Path(__file__).parent / "codes"


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


if __name__ == "__main__":
    for name, text in pages().items():
        (PAGES / name).write_text(text)
