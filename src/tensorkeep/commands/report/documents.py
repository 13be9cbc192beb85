"""Make the page of a document that another command gave with `--json`; what it holds says which command that was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorkeep.commands.report import diagnosis, differences, merged
from tensorkeep.errors import TensorkeepError, printable
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json

_HINT = (
    "a run's folder, or a document of tensorkeep diagnose, verify, diff, merge or eval detection with --json, or "
    "detections with --annotations"
)


def page_of(path: str | Path, diff: str | Path | None = None) -> str:
    """Return the page of a document.

    Args:
        path: of `diagnose`, `verify`, `diff`, `merge` or `eval detection`, with --json.
        diff: the document of a `diff`, for the figures of every tensor of a diagnosis.

    Raises:
        TensorkeepError: it is none of these.
    """
    path = Path(path)
    document = read_document(path)
    if isinstance(document.get("findings"), list) and "results" not in document:
        return diagnosis.page(document, _differences(Path(diff)) if diff else None)
    if diff is not None:
        raise TensorkeepError("is for a diagnosis", where="--diff", hint="tensorkeep report DIFF.json -o page.html")
    if isinstance(document.get("tensors"), list) and {"a", "b"} <= set(document):
        return differences.page(document)
    if document.get("dry_run") is True:
        raise TensorkeepError("is a plan: nothing was merged", where=path, hint="leave --dry-run out")
    if isinstance(document.get("merged"), list) or isinstance(document.get("rounded"), Mapping):
        return merged.page(document)
    if isinstance(document.get("AP"), Mapping):
        from tensorkeep.commands.report.scored import scored_page

        return scored_page(document, path)
    if isinstance(document.get("error"), Mapping):
        what = f"holds the error of a command: {printable(str(document['error'].get('message')), 200)}"
        raise TensorkeepError(what, where=path, hint="run that command again")
    raise TensorkeepError("is no document that a page can be made of", where=path, hint=_HINT)


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON document of this program.

    Raises:
        TensorkeepError: it is a folder, no JSON object, or of a later schema.
    """
    if path.is_dir():
        raise TensorkeepError("is a folder without metrics.jsonl, so no run", where=path, hint=_HINT)
    found = parse_json(read_small(path), path)
    if not isinstance(found, dict):
        raise TensorkeepError("is no document that a page can be made of", where=path, hint=_HINT)
    if found.get("schema", 1) != 1:
        what = f"schema {printable(str(found['schema']), 40)} is not known here"
        raise TensorkeepError(what, where=path, hint="a newer tensorkeep wrote it")
    return found


def _differences(path: Path) -> dict[str, Any]:
    """Read the document of a diff."""
    found = read_document(path)
    if not isinstance(found.get("tensors"), list):
        raise TensorkeepError("has no list of tensors", where=path, hint="tensorkeep diff A B --json > diff.json")
    return found
