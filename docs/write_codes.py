"""Write docs/codes/: one page a finding code, from the check's own docstring (a test holds them equal).

python docs/write_codes.py
"""

from __future__ import annotations

from pathlib import Path

from tensorkeep.diagnosis.checks import CODES, explain, title

PAGES = Path(__file__).parent / "codes"


def pages() -> dict[str, str]:
    """Every page by file name, the index included."""
    out = {f"{code}.md": page(code) for code in CODES}
    rows = "\n".join(f"| [{code}]({code}.md) | {title(code)} |" for code in CODES)
    out["README.md"] = (
        f"# Finding codes\n\nIn order of precedence. `tensorkeep explain CODE` prints the same pages.\n\n| code | says |\n|---|---|\n{rows}\n"
    )
    return out


def page(code: str) -> str:
    """`explain CODE` as Markdown: its first line as the head, one paragraph a line that opens a new thought."""
    first, _, rest = explain(code).partition("\n")
    return f"# {first.rstrip('.')}\n\n{rest.strip()}\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (PAGES / name).write_text(text)
