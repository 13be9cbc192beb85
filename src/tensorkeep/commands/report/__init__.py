"""The command `report`: a run, several runs, or what another command gave with `--json`, as one offline HTML page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tensorkeep.commands.shared import Say, prepare
from tensorkeep.errors import TensorkeepError, word
from tensorkeep.storage.overwriting import PAGE, refuse_existing


def report(
    *sources: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    diff: Path | None = None,
    annotations: Path | None = None,
    videos: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    say: Say = Say(),
) -> int:
    """One offline HTML page of a run, of several runs (`compare RUN RUN...`), or of a document of another command.

    Parameters
    ----------
    sources
        A run's folder; or a document of `diagnose`, `verify`, `diff`, `merge` or `eval detection` with --json; or
        detections of any program; or the word compare and two runs or more.
    out
        The page to write.
    diff
        With a diagnosis: the document of `tensorkeep diff A B --json`, for the figures of every tensor.
    annotations
        With detections: what is true, for an error analysis and true segments.
    videos
        With detections: the folder of the videos, for frames.
    overwrite
        Replace an existing page.
    """
    printer = say.output()
    if not sources:
        raise TensorkeepError("nothing to make a page of", hint="tensorkeep report RUN -o page.html")
    prepare(printer, out)
    refuse_existing(out, overwrite, PAGE)
    from tensorkeep.commands.report._frame import write

    write(_page(sources, diff, annotations, videos), out, overwrite)
    if say.json:
        printer.document({"page": str(out)})
    printer.line(str(out))
    return 0


def _page(sources: tuple[str, ...], diff: Path | None, annotations: Path | None, videos: Path | None) -> str:
    """Return the page of what is named."""
    first = Path(sources[0])
    if sources[0] == "compare":
        _only(sources[0], diff=diff, annotations=annotations, videos=videos)
        from tensorkeep.commands.report.compare import compare_page

        return compare_page(sources[1:])
    if len(sources) > 1:
        named = " ".join(map(word, sources))
        hint = f"tensorkeep report compare {named} -o page.html"
        raise TensorkeepError(f"{len(sources)} sources: a page is of one, or of runs compared", hint=hint)
    if (first / "metrics.jsonl").is_file() or (first / "status.json").is_file():
        _only(sources[0], diff=diff, annotations=annotations, videos=videos)
        from tensorkeep.commands.report.run import run_page

        return run_page(first)
    if annotations is not None or videos is not None or _holds_detections(first):
        _only(sources[0], diff=diff)
        from tensorkeep.commands.report.detections import detections_page

        return detections_page(first, annotations, videos)
    from tensorkeep.commands.report.documents import page_of

    return page_of(first, diff)


def _only(source: str, **given: Path | None) -> None:
    """Refuse flags that say nothing of this source."""
    for flag, value in given.items():
        if value is not None:
            what = "is for a diagnosis" if flag == "diff" else "is for a file of detections"
            raise TensorkeepError(f"{what}, and {source} is none", where=f"--{flag}", hint="leave it out")


def _holds_detections(path: Path) -> bool:
    """Whether a file is one of detections: a JSON object with `results`."""
    if path.is_dir():
        return False
    from tensorkeep.commands.report.documents import read_document

    return isinstance(read_document(path).get("results"), (dict, list))
