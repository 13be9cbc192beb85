"""The manifest of a checkpoint: sizes and digests that cover every byte of it, written last.

It holds the size of every file and the xxh3_128 of its every 16 MiB, place and xxh3_128 of every tensor, and a digest
of itself; its text is canonical (what `manifest_bytes` makes), so that no flipped bit in it can go unseen.

`{"schema": 1, "step": 123, "chunk": 16777216, "files": {FILE: {"bytes", "chunks": [xxh3_128, ...]}}, "tensors": {FILE:
{NAME: {"dtype", "shape", "start": first byte in the file, "xxh3_128"}}}, "base": {...} | null, "not_captured": [...],
"xxh3_128": of this text without this entry}`. Where several ranks wrote, each has a list of its shards beside its file.
Where every host keeps its own ranks' files, `"hosts": [{"name", "files": [...]}, ...]` says which, on each host alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from tensorkeep.errors import TensorkeepError, shown
from tensorkeep.findings import Finding
from tensorkeep.storage import durable
from tensorkeep.storage.certificate import SCHEMA, indented, parse_json
from tensorkeep.storage.files import Progress, explained, inside, open_plain, spelled_plainly
from tensorkeep.storage.manifest_entries import (
    FileEntry,
    ShardEntry,
    TensorEntry,
    damaged_tensors,
    digests_in,
    list_name,
    shard_list,
    tensor_entry,
)
from tensorkeep.storage.manifest_hosts import Held, hosts_in, part_of

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 256 << 20  # bytes; a hundred thousand tensors need 20 MB
_BEFORE = "use the checkpoint before it"
_STEP = re.compile(r"step-(\d{6,})\Z")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: the optimizer step it was saved at.
        files: file name -> size and digests.
        tensors: file name -> tensor name -> position and digest.
        base: what identifies the frozen weights under an adapter; None where everything is in the checkpoint.
        not_captured: names of what the run could not save.
        hosts: where every host kept its own ranks' files: its name, and the files; else none.
    """

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]
    base: dict[str, Any] | None
    not_captured: tuple[str, ...]
    hosts: Held = ()


def step_name(step: int) -> str:
    """Return the name of a step's folder.

    Args:
        step: the optimizer step: 123 is step-000123.
    """
    return f"step-{step:06}"


def step_of(name: str) -> int | None:
    """Return the step that a folder's name stands for, None for any other name.

    Args:
        name: the folder's name, without its path.

    Example:
        >>> step_of("step-000123"), step_of("step-123"), step_of("step-0000123")
        (123, None, None)
    """
    match = _STEP.match(name)
    return int(match[1]) if match and len(match[1]) < 19 and step_name(int(match[1])) == name else None


def manifest_bytes(document: Mapping[str, Any]) -> bytes:
    """Write a manifest in its one spelling, with its own digest at the end.

    Args:
        document: the manifest; a digest in it is replaced.
    """
    body = {k: v for k, v in document.items() if k != "xxh3_128"}
    text = indented(body, quoted=encode_basestring_ascii)
    head = f"{text[:-2]},\n" if body else "{\n"
    digest = xxhash.xxh3_128((text + "\n").encode()).hexdigest()
    return f'{head} "xxh3_128": "{digest}"\n}}\n'.encode()


def make_manifest(
    step: int,
    files: Mapping[str, durable.Written],
    tensors: Mapping[str, Mapping[str, tuple[str, Sequence[int], int]]],
    base: Mapping[str, Any] | None = None,
    not_captured: Sequence[str] = (),
    hosts: Sequence[tuple[str, Sequence[str]]] = (),
) -> bytes:
    """Make the manifest of files that were just written.

    Args:
        step: the optimizer step.
        files: file name -> what `durable.write_file` gave.
        tensors: file name -> tensor name -> (dtype, shape, first byte in the file).
        base: what identifies the frozen weights under an adapter.
        not_captured: names of what could not be saved.
        hosts: where every host keeps its own ranks' files: its name, and the files.

    Returns:
        The bytes of the manifest file.
    """
    return manifest_bytes(
        {
            "schema": SCHEMA,
            "step": step,
            "chunk": durable.CHUNK,
            "files": {name: {"bytes": w.size, "chunks": w.chunks} for name, w in files.items()},
            "tensors": {
                file: {
                    name: {"dtype": dtype, "shape": list(shape), "start": start, "xxh3_128": files[file].tensors[name]}
                    for name, (dtype, shape, start) in entries.items()
                }
                for file, entries in tensors.items()
            },
            "base": base,
            "not_captured": list(not_captured),
            **({"hosts": [{"name": name, "files": list(own)} for name, own in hosts]} if hosts else {}),
        }
    )


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read the manifest of a checkpoint, compare its own digest and check every entry.

    Args:
        folder: the step folder.
        name: the manifest's file; that of a lone file has another name.

    Returns:
        The manifest, checked.

    Raises:
        TensorkeepError: F01 where there is none, F03 where it was changed, F06 or F07 where what it says cannot be.
    """
    path = folder / name
    if not os.path.lexists(path):
        with explained(folder):
            folder.stat()
        raise TensorkeepError(f"has no {name}: the save was interrupted", where=folder, code="F01", hint=_BEFORE)
    with explained(path), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_MANIFEST:
            raise _odd(path, f"is no manifest: {size} bytes")
        data = file.read()
    try:
        document = parse_json(data, path)
        same = isinstance(document, dict) and manifest_bytes(document) == data
    except (TensorkeepError, RecursionError, ValueError):  # ValueError: numbers too long to be written again
        same = False
    if not same:
        raise TensorkeepError("was changed or damaged after it was written", where=path, code="F03", hint=_BEFORE)
    return _checked(document, path)


def _opened(path: Path) -> BinaryIO:
    """Open a file of a checkpoint for reading; F07 where it is a link or no file: a save makes neither."""
    try:
        return os.fdopen(open_plain(path, os.O_RDONLY), "rb")
    except TensorkeepError as error:
        raise _odd(path, error.what) from None


def _odd(path: Path, what: str) -> TensorkeepError:
    """Make the error for a manifest that says what cannot be (F07)."""
    return TensorkeepError(what, where=path, code="F07", hint=_BEFORE)


def _checked(document: dict[str, Any], path: Path) -> Manifest:
    """Turn a parsed manifest into a `Manifest`, every entry checked."""
    step, files, tensors = document.get("step"), document.get("files"), document.get("tensors")
    if document.get("schema") != SCHEMA or document.get("chunk") != durable.CHUNK:
        raise _odd(path, f"is of schema {shown(document.get('schema'))}, this version reads {SCHEMA}")
    if type(step) is not int or not 0 <= step < 1 << 62 or not isinstance(files, dict) or not isinstance(tensors, dict):
        raise _odd(path, "lacks step, files or tensors")
    base, lost = document.get("base"), document.get("not_captured")
    if not (base is None or isinstance(base, dict)) or not isinstance(lost, list):
        raise _odd(path, "base or not_captured are not what they should be")
    sizes = {_plain(name, path): _file(name, entry, path) for name, entry in files.items()}
    found = {}
    for file, entries in tensors.items():
        if file not in sizes or not isinstance(entries, dict):
            raise _odd(path, f"tensors of {shown(file)}, which is none of its files")
        found[file] = {name: _tensor(name, entry, sizes[file].size, path) for name, entry in entries.items()}
    hosts = hosts_in(document.get("hosts", []), sizes)
    if hosts is None:
        raise _odd(path, "hosts are not what they should be")
    return Manifest(step, sizes, found, base, tuple(str(n) for n in lost), hosts)


def _plain(name: str, path: Path) -> str:
    """Check that a name is that of a file in the checkpoint, behind no link."""
    if name == path.name or not spelled_plainly(inside(name, path), path.parent):
        raise _odd(path, f"names {shown(name)} as a file of its own")
    return name


def _file(name: str, entry: Any, path: Path) -> FileEntry:
    """Check one file's entry."""
    size, chunks = (entry.get("bytes"), entry.get("chunks")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or not 0 <= size < 1 << 62 or not isinstance(chunks, list):
        raise _odd(path, f"{shown(name)} has no size or no digests")
    if len(chunks) != -(-size // durable.CHUNK) or digests_in(chunks) is None:
        raise _odd(path, f"{shown(name)} has {len(chunks)} digests for {size} bytes")
    return FileEntry(size, chunks)


def _tensor(name: str, entry: Any, size: int, path: Path) -> TensorEntry:
    """Check one tensor's entry; it must lie within its file of `size` bytes."""
    found = tensor_entry(entry, size)
    if found is None:
        raise _odd(path, f"the entry of {shown(name)} cannot be")
    return found


# -- is it what the manifest says? --------------------------------------------------------------------------------


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every file of a checkpoint is there and has its size; content is not read.

    Args:
        folder: the step folder.
        manifest: its manifest.

    Raises:
        TensorkeepError: F05 for a file that is not there, F02 or F07 for one of another size, F07 for a folder of
            another step.
    """
    if step_of(folder.name) not in (None, manifest.step):
        raise _odd(folder, f"holds step {manifest.step}: the folder was renamed")
    for name, entry in manifest.files.items():
        path = folder / name
        if not os.path.lexists(path):
            part, lost = part_of(folder, manifest.files, manifest.hosts), _names(folder, manifest, name)
            raise part or TensorkeepError(f"{name} is missing", where=folder, code="F05", hint=_BEFORE, tensors=lost)
        with explained(path), _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            gone = _names(folder, manifest, name, beyond=size)
            raise TensorkeepError(
                f"has {size} bytes, {entry.size} were written" + (f"; {_listed(gone)} reach beyond" if gone else ""),
                where=path,
                code="F02" if size < entry.size else "F07",
                hint=_BEFORE,
                tensors=gone,
            )


def read_whole(folder: Path, name: str, manifest: Manifest, image: memoryview | None = None) -> None:
    """Read one file of a checkpoint and compare the digests of every byte.

    Args:
        folder: the step folder.
        name: the file.
        manifest: the checkpoint's manifest.
        image: receives the bytes (from `durable.allocate`); without one they are only compared.

    Raises:
        TensorkeepError: F03 naming the damaged tensors.
    """
    entry, path = manifest.files[name], folder / name
    try:
        wrong = durable.read_file(path, entry.size, entry.chunks, image)
    except OSError as error:
        if error.errno != errno.EIO:
            with explained(path):
                raise
        raise TensorkeepError(
            "cannot be read: the disk failed (input/output error)",
            where=path,
            code="F03",
            hint="use the checkpoint before it; check the disk: dmesg, smartctl",
            tensors=_names(folder, manifest, name),
        ) from None
    if wrong:
        whole, shards = manifest.tensors.get(name, {}), shards_in(folder, name, manifest)
        with explained(path), _opened(path) as file:
            tensors = damaged_tensors(file, whole, shards, wrong, durable.CHUNK)
        what = _listed(tensors) if tensors else "its header" if whole else "its content"
        raise TensorkeepError(
            f"damaged since it was written: {what}", where=path, code="F03", hint=_BEFORE, tensors=tensors
        )


def check_head(folder: Path, name: str, manifest: Manifest) -> None:
    """Compare the first 16 MiB of a file before its header is believed; F03 where they differ."""
    with explained(folder / name), _opened(folder / name) as file:
        head = file.read(durable.CHUNK)
    if manifest.files[name].chunks and durable.digest(head) != manifest.files[name].chunks[0]:
        read_whole(folder, name, manifest)


def shards_in(folder: Path, name: str, manifest: Manifest) -> list[ShardEntry]:
    """Read what lies in a file that one of several ranks wrote, from the list beside it.

    Args:
        folder: the step folder.
        name: the file.
        manifest: the checkpoint's manifest.

    Returns:
        The shards; none where the file has no such list.

    Raises:
        TensorkeepError: F03 where the list was changed, F07 where what it says cannot be.
    """
    listed = list_name(name)
    if listed not in manifest.files or name not in manifest.files:
        return []
    size = manifest.files[listed].size
    image = durable.allocate(size)
    read_whole(folder, listed, manifest, image)
    shards = shard_list(parse_json(bytes(image[:size]), folder / listed), manifest.files[name].size)
    if shards is None:
        raise _odd(folder / listed, f"what it says of {name} cannot be")
    return shards


def _names(folder: Path, manifest: Manifest, name: str, beyond: int = -1) -> list[str]:
    """Name the tensors of a file, those that reach beyond a byte of it."""
    ends = {n: t.start + t.nbytes for n, t in manifest.tensors.get(name, {}).items()}
    with contextlib.suppress(TensorkeepError):  # damaged as well, which is said of the list
        for shard in shards_in(folder, name, manifest):
            ends[shard.tensor] = max(ends.get(shard.tensor, 0), sum(shard.archive))
    return [n for n, end in ends.items() if end > beyond]


def _listed(names: Sequence[str]) -> str:
    """Spell at most four names for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def findings(folder: Path, progress: Progress | None = None, name: str = MANIFEST) -> list[Finding]:
    """Check every byte of a checkpoint.

    Args:
        folder: the step folder.
        progress: called after each file with ("verify", bytes done, bytes in all).
        name: the manifest's file.

    Returns:
        One finding per damaged file, naming tensors; empty where the checkpoint is whole.
    """
    try:
        manifest = read_manifest(folder, name)
        check_sizes(folder, manifest)
    except TensorkeepError as error:
        return [as_finding(error)]
    out, done, total = [], 0, sum(entry.size for entry in manifest.files.values())
    for file, entry in manifest.files.items():
        try:
            read_whole(folder, file, manifest)
        except TensorkeepError as error:
            out.append(as_finding(error))
        done += entry.size
        if progress:
            progress("verify", done, total)
    return out


def as_finding(error: TensorkeepError, severity: Any = "error") -> Finding:
    """Return an error with an F code as a finding.

    Args:
        error: the error.
        severity: of the finding, "error" or "warning".

    Raises:
        TensorkeepError: the error itself where its code is another: it says nothing about the checkpoint.
    """
    if error.code is None or not error.code.startswith("F"):
        raise error
    return Finding(error.code, severity, f"{error.where}: {error.what}", error.tensors, fix=error.hint)
