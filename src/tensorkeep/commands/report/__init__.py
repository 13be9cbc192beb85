"""The command `report`: a run or a diagnosis as one offline HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Say, prepare


def report(
    source: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    diff: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    say: Say = Say(),
) -> int:
    """One offline HTML page: of a run its curves and results, of a diagnosis its findings and figures.

    Parameters
    ----------
    source
        A run's folder, or the document of `tensorkeep diagnose CKPT --json`.
    out
        The page to write.
    diff
        The document of `tensorkeep diff A B --json`, for the figures of every tensor of a diagnosis.
    overwrite
        Replace an existing page.
    """
    printer = say.output()
    prepare(printer, out)
    if (Path(source) / "metrics.jsonl").is_file():
        from tensorkeep.commands.report.run import write_run_page

        write_run_page(source, out, overwrite)
    else:
        from tensorkeep.commands.report._page import write_page

        write_page(source, out, diff, overwrite)
    if say.json:
        printer.document({"page": str(out)})
    printer.line(str(out))
    return 0
