"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorkeep.commands.shared import Say

if TYPE_CHECKING:
    pass


def explain(code: str, /, *, say: Say = Say()) -> int:
    """What a finding code means: how it happens, how it shows, what to do.

    Parameters
    ----------
    code
        A code such as K04 or O01.
    """
    from tensorkeep.diagnosis.checks import explain as page

    out = say.output()
    text = page(code)
    if say.json:
        out.document({"code": code.upper(), "title": text.splitlines()[0], "text": text})
    out.line(text)
    return 0
