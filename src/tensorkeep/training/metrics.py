"""Read and write the rows of a run (`metrics.jsonl`, `proof.jsonl`, `resumes.jsonl`): one JSON object a line.

A row of the first two belongs to a step, and no step has two. After a resume from step k the rows of later steps are
taken away before they are made again, and a last line that a kill or a power cut left in pieces goes with them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.files import explained, open_plain
from tensorkeep.storage.placement import replacing, sync_folder, write_bytes

METRICS, PROOF, RESUMES = "metrics.jsonl", "proof.jsonl", "resumes.jsonl"
_LARGEST = 1 << 30  # bytes; a million updates write some 300 MB
_LONGEST = 4 << 20  # bytes of a line; an evaluation of a thousand classes writes some 50 kB
MEASURED = ("seconds", "memory")  # of a row: what the machine says, another number in every run
Row = dict[str, Any]


def stream(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of any length, oldest first, in the memory of one line; a torn end is left out.

    Args:
        path: the file; where it is not there, there are no rows.

    Raises:
        TensorkeepError: as `rows`, and where a line is longer than 4 MiB.
    """
    if not path.exists():
        return
    number, bad = 0, 0
    with explained(path), os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        while line := file.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                raise TensorkeepError(f"line {number} is longer than {_LONGEST:,} bytes", where=path)
            row = _row(line) if line.endswith(b"\n") else None
            if row is None:
                bad = bad or number
                continue
            if bad:
                raise TensorkeepError(f"line {bad} is no row", where=path, hint="move the file away and resume")
            yield row


def rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, oldest first; what a crash left in pieces at its end is left out.

    Args:
        path: the file; where it is not there, there are no rows.

    Raises:
        TensorkeepError: a line amid others is no row, so somebody else wrote into the file.
    """
    for _line, row in _lines(path):
        yield row


def no_rows(path: Path) -> int:
    """Count the lines at the end of a file that are no rows; a crash leaves one.

    Args:
        path: the file; where it is not there, there are none.

    Returns:
        How many.
    """
    if not path.exists():
        return 0
    lines = read_small(path, _LARGEST).split(b"\n")
    return len([line for line in lines if line.strip()]) - len(_lines(path))


def comparable(path: Path) -> list[Row]:
    """Read the rows without what was measured of the machine (`seconds`, `memory`): two runs of one course are equal.

    Args:
        path: the file; where it is not there, there are no rows.

    Returns:
        The rows, oldest first.

    Raises:
        TensorkeepError: as `rows`.
    """
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows(path)]


def _lines(path: Path) -> list[tuple[bytes, Row]]:
    """Read each whole line with its row, up to the last row.

    Rows are on the disk before the checkpoint of their step is, so what a crash ruins is always the end.
    """
    if not path.exists():
        return []
    lines = read_small(path, _LARGEST).split(b"\n")
    read = [(line, _row(line)) for line in lines[:-1]]
    sound = [index for index, (_, row) in enumerate(read) if row is not None]
    end = sound[-1] + 1 if sound else 0
    for number, (_line, row) in enumerate(read[:end], 1):
        if row is None:
            raise TensorkeepError(f"line {number} is no row", where=path, hint="move the file away and resume")
    return [(line, row) for line, row in read[:end] if row is not None]


def _row(line: bytes) -> Row | None:
    """Read a line as a JSON object whose `step` is a whole number; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def finite(value: Any) -> Any:
    """Replace every NaN and infinity in nested values by None, since JSON has none.

    Args:
        value: mappings, lists and plain values.

    Returns:
        The same with None for what JSON cannot say.

    Example:
        >>> finite({"loss": float("nan"), "evaluation": {"mAP": 0.5}})
        {'loss': None, 'evaluation': {'mAP': 0.5}}
    """
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _opened(path: Path) -> RawIOBase:
    """The file, made where there is none, to write at its end; never through a link."""
    return os.fdopen(open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab", buffering=0)


def append(path: Path, row: Mapping[str, Any], durable: bool = False) -> None:
    """Append a row in one write; `durable` also waits for the disk."""
    with explained(path), _opened(path) as file:
        file.write((json.dumps(finite(row)) + "\n").encode())
        if durable:
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until every row is on the disk: a checkpoint must not be newer than the rows before it."""
    if path.exists():
        with explained(path), _opened(path) as file:
            os.fsync(file.fileno())


def rewind(path: Path, step: int) -> int:
    """Delete the rows after `step` (and a torn end) in one step; where there is no file, make an empty one.

    Returns:
        How many lines were deleted.
    """
    made = not os.path.lexists(path)
    with explained(path):
        _opened(path).close()  # makes it, and refuses a link
        if made:
            sync_folder(path.parent)
            return 0
    return keep(path, lambda row: bool(row["step"] <= step))


def keep(path: Path, wanted: Callable[[Row], bool]) -> int:
    """Delete the rows that are not wanted (and a torn end) in one step.

    Returns:
        How many lines were deleted.
    """
    kept = b"".join(line + b"\n" for line, row in _lines(path) if wanted(row))
    with explained(path):
        before = read_small(path, _LARGEST) if path.exists() else b""
    if kept != before:
        with replacing(path, overwrite=True) as temporary:
            write_bytes(temporary, kept)
    return len(before.splitlines()) - kept.count(b"\n")
