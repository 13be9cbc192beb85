"""Read training texts: records with texts, conversations or preferences (see `sources`), and plain text files.

A line that is no record is an error with its number: a file that is half read would train on half the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from tensorkeep.errors import TensorkeepError
from tensorkeep.language.data.conversations import KINDS, Format, Objective, Record, record_of
from tensorkeep.language.data.sources import documents, expanded, is_plain, text_of


def records(paths: Sequence[str | Path], objective: Objective, form: Format = "auto") -> Iterator[Record]:
    """Read every record of the files in their order; a plain text file is one text.

    Args:
        paths: the files.
        objective: decides what a record is: a text for `pretrain`, a conversation for `sft`, a preference for `dpo`.
        form: `auto` goes by the file's ending.

    Raises:
        TensorkeepError: names file and line of what is no such record.

    Example:
        >>> next(records(["stories.txt"], "pretrain"))[:16]                  # doctest: +SKIP
        'Once upon a time'
    """
    for path in expanded(paths):
        yield from records_of(path, objective, form)


def records_of(
    path: Path, objective: Objective, form: Format = "auto", begin: int = 0, end: int | None = None
) -> Iterator[Record]:
    """Read the records of one file, as `records` does; of a file of lines those that begin at `begin` to `end`.

    Args:
        path: the file.
        objective: as in `records`.
        form: as in `records`.
        begin: first byte of the part that is read.
        end: byte behind it; None: the file's end.

    Raises:
        TensorkeepError: as `records` does.
    """
    if is_plain(path, form):
        yield _plain(path, objective)
        return
    for where, document in documents(path, form, begin, end):
        yield record_of(document, objective, where)


def objective_of(path: str | Path) -> Objective:
    """Guess the objective that a file's first record is for; plain text is for `pretrain`."""
    first = expanded([path])[0]
    if is_plain(first, "auto"):
        return "pretrain"
    document: Any = next((d for _, d in documents(first)), {})
    found = next((kind for key, kind in KINDS.items() if isinstance(document, dict) and key in document), "pretrain")
    return cast(Objective, found)


def _plain(path: Path, objective: Objective) -> str:
    """The text of a plain file, decoded as UTF-8."""
    if objective != "pretrain":
        raise TensorkeepError(
            f"is plain text, which {objective} cannot use",
            where=path,
            hint='objective: pretrain, or JSON lines: {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    try:
        return text_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TensorkeepError(f"is no UTF-8 text (byte {error.start})", where=path, hint="convert it: iconv") from None
