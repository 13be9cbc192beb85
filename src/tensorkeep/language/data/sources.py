"""The files that a recipe's `files` name, and the records in each: lines of JSON, tables, tar files, plain texts.

| ending | what it holds |
|---|---|
| `.jsonl` `.json` `.ndjson`, also with `.gz` | an object a line |
| `.parquet` | a table: a row is a record |
| `.arrow` | a table as `datasets` saves it |
| `.tar` | webdataset: files of one name before the ending are a record; `.txt` and `.json` are read |
| any other, also with `.gz` | one plain text |

A folder stands for its files in order of their names, or for a data set that `datasets` saved there; a pattern
(`corpus/*.jsonl`) for the files it fits. Tables are read by pyarrow, a group of rows at a time.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage.documents import read_json
from tensorkeep.storage.files import explained

LINES, TABLES, TAR, GZIP = (".jsonl", ".json", ".ndjson"), (".parquet", ".arrow"), ".tar", ".gz"
KNOWN = (*LINES, *TABLES, TAR, ".txt")  # what is taken out of a folder: a README.md is none
LONGEST = 64 << 20  # bytes of one record
_ROWS = 256  # of a table, read at a time
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def expanded(names: Sequence[str | Path]) -> list[Path]:
    """Return the files that names, folders and patterns stand for, in order.

    Args:
        names: as in a recipe's `files`.

    Raises:
        TensorkeepError: a folder has nothing to read, or several splits; a pattern fits nothing.
    """
    found: list[Path] = []
    for name in map(Path, names):
        if name.is_dir():
            found += _in_folder(name)
        elif not name.exists() and any(c in str(name) for c in "*?["):
            start = Path(name.anchor) if name.is_absolute() else Path()
            fitting = sorted(p for p in start.glob(str(name.relative_to(name.anchor))) if p.is_file())
            if not fitting:
                raise TensorkeepError("fits no file", where=name, code="F05")
            found += fitting
        else:
            found.append(name)
    return found


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder, or the shards of a data set that `datasets` saved, in its order."""
    if (folder / _SPLITS).is_file():
        splits = sorted(p.parent.name for p in folder.glob(f"*/{_STATE}"))
        hint = f"name one: {folder / splits[0]}" if splits else None
        raise TensorkeepError(f"holds the splits {', '.join(splits)}", where=folder, hint=hint)
    if (folder / _STATE).is_file():
        document = read_json(folder / _STATE)
        rows = document.get("_data_files") if isinstance(document, dict) else None
        names = [row.get("filename") if isinstance(row, dict) else None for row in rows or []]
        if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise TensorkeepError("names no shards of a data set", where=folder / _STATE)
        return [folder / str(name) for name in names]
    found = sorted(p for p in folder.rglob("*") if p.is_file() and _ending(p) in KNOWN)
    if not found:
        raise TensorkeepError("holds no texts", where=folder, hint=f"endings that are read: {', '.join(KNOWN)}")
    return found


def _ending(path: Path) -> str:
    """The ending that says what a file holds, in small letters; `.gz` is left out."""
    return Path(path.name.removesuffix(GZIP) if path.suffix.lower() == GZIP else path.name).suffix.lower()


def as_lines(path: Path, form: str) -> bool:
    """Whether a file is read line by line; `form` is the recipe's `format`."""
    return _ending(path) in LINES if form == "auto" else form == "jsonl"


def is_plain(path: Path, form: str) -> bool:
    """Whether a file is one plain text."""
    return not as_lines(path, form) and (form == "text" or _ending(path) not in (*TABLES, TAR))


def text_of(path: Path) -> bytes:
    """The bytes of a plain text, unpacked."""
    with explained(path), _stream(path) as file:
        return file.read()


def documents(path: Path, form: str = "auto", begin: int = 0, end: int | None = None) -> Iterator[tuple[str, Any]]:
    """Read the records of a file that is no plain text, each with its place for errors.

    Args:
        path: the file.
        form: the recipe's `format`.
        begin: byte that a line must begin at or after, of a file of lines that is not packed; of a parquet file the
            first row group.
        end: byte that a line must begin before, or the row group behind the last; None: the file's end.

    Raises:
        TensorkeepError: the file cannot be read, or something in it is no record.
    """
    if as_lines(path, form):
        return _lines(path, begin, end)
    return _of_tar(path) if _ending(path) == TAR else _of_table(path, begin, end)


def units_of(path: Path, form: str, size: int) -> list[tuple[int, int | None]]:
    """Divide a file into stretches that `documents` reads each by itself.

    Args:
        path: the file.
        form: the recipe's `format`.
        size: bytes of a stretch of a file of lines.

    Returns:
        `begin` and `end` of each: bytes of lines, row groups of a parquet file; any other file is one stretch.

    Raises:
        TensorkeepError: the file cannot be read.
    """
    if as_lines(path, form) and path.suffix.lower() != GZIP:
        with explained(path):
            total = path.stat().st_size
        bounds = [*range(0, max(total, 1), size), total]
        return list(itertools.pairwise(bounds))
    if not is_plain(path, form) and _ending(path) == ".parquet":
        arrow, parquet = _pyarrow(path)
        try:
            with explained(path), path.open("rb") as file:
                groups = parquet.ParquetFile(file).num_row_groups
        except arrow.ArrowException as error:
            raise TensorkeepError(f"is no parquet file: {str(error)[:120]}", where=path, code="F02") from None
        return [(group, group + 1) for group in range(groups)]
    return [(0, None)]


def _lines(path: Path, begin: int, end: int | None) -> Iterator[tuple[str, Any]]:
    """Place and JSON value of every line that is not blank."""
    with explained(path), _stream(path) as file:
        before = 0
        if begin:
            file.seek(begin - 1)
            file.readline(LONGEST)  # a line that begins before `begin` belongs to the part before
        place = file.tell()
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            if end is not None and place >= end:
                return
            place += len(line)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                before = before or _lines_before(path, begin)
                what = f"is no JSON: {str(error)[:100]}"
                hint = "one object a line; a plain text file takes data.format: text"
                raise TensorkeepError(what, where=f"{path}: line {before + number}", hint=hint) from None
            yield f"{path}: line {number}" if not begin else f"{path}: line {number} from byte {begin}", value


def _lines_before(path: Path, begin: int) -> int:
    """Count the lines that begin before a byte."""
    found, left = 0, begin - 1
    if begin:
        with path.open("rb") as file:
            while left > 0 and (piece := file.read(min(left, 8 << 20))):
                found, left = found + piece.count(b"\n"), left - len(piece)
    return found + (begin > 0)


def _stream(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked where its ending says it is packed."""
    return _Unpacked(path) if path.suffix.lower() == GZIP else path.open("rb")  # type: ignore[return-value]


class _Unpacked(gzip.GzipFile):
    """A gzip file whose damage is one error."""

    def __init__(self, path: Path) -> None:
        self._place = path
        super().__init__(path, "rb")

    def readline(self, size: int | None = -1) -> bytes:
        try:
            return super().readline(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TensorkeepError(f"is damaged: {error}", where=self._place, code="F02") from None

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TensorkeepError(f"is damaged: {error}", where=self._place, code="F02") from None


def _pyarrow(path: Path) -> tuple[Any, Any]:
    """Return pyarrow and its parquet module."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        hint = "pip install 'tensorkeep[tables]'"
        raise TensorkeepError("a table needs pyarrow, which is not installed", where=path, hint=hint) from None


def _of_table(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, Any]]:
    """The rows of a table as records; of a parquet file those of some row groups."""
    (arrow, parquet), number = _pyarrow(path), 0
    group = f" of row group {begin + 1}" if begin else ""
    try:
        with explained(path), path.open("rb") as file:
            for batch in _batches(arrow, parquet, path, file, None if end is None else range(begin, end)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}{group}", {k: v for k, v in row.items() if v is not None}
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        what = f"cannot be read after row {number}{group}: {str(error)[:120]}"
        raise TensorkeepError(what, where=path, code="F02") from None


def _batches(arrow: Any, parquet: Any, path: Path, file: IO[bytes], groups: Sequence[int] | None) -> Iterator[Any]:
    """Pieces of a table, of a parquet file those of some row groups (None: all)."""
    if _ending(path) == ".parquet":
        yield from parquet.ParquetFile(file).iter_batches(batch_size=_ROWS, row_groups=groups)
        return
    try:
        reader: Any = arrow.ipc.open_stream(file)
        found = iter(reader)
    except arrow.ArrowInvalid:
        file.seek(0)
        reader = arrow.ipc.open_file(file)
        found = (reader.get_batch(k) for k in range(reader.num_record_batches))
    for batch in found:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _of_tar(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a webdataset: members of one name before its first dot, one after another."""
    key, held = "", dict[str, Any]()
    try:
        with explained(path), tarfile.open(path, "r|") as file:
            for member in file:
                name = Path(member.name).name
                one = f"{Path(member.name).parent}/{name.partition('.')[0]}"
                ending = Path(name).suffix.lower()
                if not member.isfile() or ending not in (".txt", ".json"):
                    continue
                if member.size > LONGEST:
                    raise TensorkeepError(
                        f"holds {member.size:,} bytes, more than a record may", where=f"{path}: {name}"
                    )
                if one != key and held:
                    yield f"{path}: {key}", held
                    held = {}
                key, data = one, file.extractfile(member)
                held |= _member(data.read() if data else b"", ending, f"{path}: {name}")
            if held:
                yield f"{path}: {key}", held
    except (tarfile.TarError, EOFError) as error:
        raise TensorkeepError(f"is no whole tar file: {error}", where=path, code="F02") from None


def _member(data: bytes, ending: str, where: str) -> dict[str, Any]:
    """What one file of a webdataset adds to its record."""
    try:
        if ending == ".txt":
            return {"text": data.decode("utf-8")}
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TensorkeepError(
            f"is no {'text' if ending == '.txt' else 'JSON'}: {str(error)[:100]}", where=where
        ) from None
    if not isinstance(found, dict):
        raise TensorkeepError("is no object", where=where)
    return found
