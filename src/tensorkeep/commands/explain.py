"""`tensorkeep explain`: the page of a finding code."""

from __future__ import annotations

from tensorkeep.commands.shared import Say


def explain(code: str, /, *, say: Say = Say()) -> int:
    """Explain a finding code: what it is, how it happens, how it shows, what to do.

    Args:
        code: A code that `diagnose` or `verify` printed, such as K04 or O01.
    """
    from tensorkeep.diagnosis.checks import explain as page

    out = say.output()
    text = page(code)
    if say.json:
        out.document({"code": code.upper(), "title": text.splitlines()[0], "text": text})
    out.line(text)
    return 0
