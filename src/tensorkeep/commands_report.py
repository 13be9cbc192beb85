"""The command that writes a page: `tensorkeep report findings.json -o page.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands import Say


def report(
    source: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    diff: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    say: Say = Say(),
) -> int:
    """One offline HTML page from a diagnosis: findings, the difference of every tensor, the losses.

    Parameters
    ----------
    source
        The document of `tensorkeep diagnose CKPT --json`.
    out
        The page to write.
    diff
        The document of `tensorkeep diff A B --json`, for the figures of every tensor.
    overwrite
        Replace an existing page.
    """
    from tensorkeep.report.page import write_page

    write_page(source, out, diff, overwrite)
    printer = say.output()
    if say.json:
        printer.document({"page": str(out)})
    printer.line(str(out))
    return 0
