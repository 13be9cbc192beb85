"""Look at the files beside the weights that a resume reads: optimizer, schedule, random state, the trainer's own state.

Nothing of them is unpickled. torch.save's archives are zips: their directory lies at the end, so that a cut one shows,
and their entries have a CRC-32. JSON must be JSON.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats import layouts
from tensorkeep.formats.companions import COMPANIONS
from tensorkeep.formats.safetensors import read_header
from tensorkeep.formats.view import STREAM_BYTES, StateView, read
from tensorkeep.storage.archive import zip_entries
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder, LocalFolder

_SAVED = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_LOOKED_AT = (*_SAVED, ".safetensors", ".json")


def opaque_objects(view: StateView) -> Iterator[Finding]:
    """Report objects beside the tensors whose classes are nobody's known: they are listed and never imported.

    Args:
        view: the checkpoint.

    Yields:
        One info (F04), or nothing.
    """
    names = sorted(view.metadata.get("opaque", ()))
    if names:
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        said = (
            f"holds objects of {', '.join(names[:6])}{more}; they stay opaque, nothing of them was imported or called"
        )
        yield Finding("F04", "info", said, evidence={"opaque": names})


def damaged_files(view: StateView, whole: bool) -> Iterator[Finding]:
    """Report files beside the weights that a resume would fail on.

    Args:
        view: the checkpoint; beside a file that was named alone nothing is looked at.
        whole: read every byte, against the archives' CRC-32; otherwise only what shows that a file was cut.

    Yields:
        One error (F02, F03 or F07) for each file, which the message names.
    """
    names = view.folder.names()
    if Path(view.path).name in names and not Path(view.path).is_dir():
        return
    own = {b.file for r in view.values() for b in r.blocks}
    for name in sorted(set(names) - own - set(COMPANIONS)):
        yield from _file(view.folder, name, whole)
    home = view.home
    if not isinstance(view.folder, LocalFolder) or not isinstance(home, LocalFolder):
        return
    if home.path != view.folder.path:
        for name in sorted(set(home.names()) - set(COMPANIONS)):
            yield from _file(home, name, whole)
    for part in sorted(p for p in home.path.iterdir() if p.is_dir() and layouts.part_of_a_save(p.name)):
        if part == view.folder.path:
            continue
        folder = LocalFolder(part)
        if ".metadata" in folder.names():
            yield from _findings(partial(_whole_dcp, folder, whole), part.name)
        for name in sorted(folder.names()):
            yield from _file(folder, name, whole, f"{part.name}/")


def cut_files(save: Path) -> Iterator[Finding]:
    """Report what in a save shows that it was cut short: archives, headers, JSON, the parts that an index names.

    Only heads and directories of files are read, at every depth of the save.

    Args:
        save: a folder, or a lone file.

    Yields:
        One error (F02, F03, F05 or F07) for each file, which the message names.
    """
    yield from _findings(partial(_readable, save), save.name)
    if not save.is_dir():
        return
    for part in sorted({save, *(p for p in save.rglob("*") if p.is_dir() and not p.is_symlink())}):
        folder, inside = LocalFolder(part), "" if part == save else f"{part.relative_to(save)}/"
        if inside and ".metadata" in folder.names():
            yield from _findings(partial(_whole_dcp, folder, False), inside.rstrip("/"))
        for name in sorted(set(folder.names()) - set(COMPANIONS)):
            yield from _file(folder, name, False, inside or "./")


def _readable(save: Path) -> None:
    """Raise where a save is damaged; one that only another program can open says nothing."""
    try:
        read(save)
    except TensorkeepError as error:
        if error.code is not None:
            raise


def _whole_dcp(folder: LocalFolder, whole: bool) -> None:
    """Raise where a DCP folder below is damaged; `whole`: its data are read too, against the archives' CRC-32."""
    view = read(folder.url)
    ranges = {(b.file, b.start, b.nbytes): n for n, r in view.items() for b in r.blocks if b.archive}
    for (file, start, length), name in ranges.items() if whole else ():
        if bad_entries(folder, file, start, length):
            raise TensorkeepError(
                f"{name} does not fit its own CRC-32", where=f"{folder.url}/{file}", code="F03", hint="copy it again"
            )


def _file(folder: Folder, name: str, whole: bool, inside: str = "") -> Iterator[Finding]:
    """Report one file, where it is one that is looked at."""
    known = layouts.is_state(name) and name.endswith(_LOOKED_AT)
    if known or name.endswith(_SAVED) or (inside and name.endswith(".safetensors")):
        yield from _findings(partial(_check, folder, name, known, whole), inside + name)


def _findings(check: Callable[[], object], name: str) -> Iterator[Finding]:
    """Call a check and turn what it raises into a finding."""
    try:
        check()
    except TensorkeepError as error:
        if error.code is None or error.code.startswith("F"):
            said = f"{name}: {error.what}; a resume reads it"
            yield Finding(error.code or "F07", "error", said, [name], fix=error.hint or "copy the checkpoint again")


def _check(folder: Folder, name: str, known: bool, whole: bool) -> None:
    """Raise where a file is not what its name and its first bytes say."""
    where, size = f"{folder.url}/{name}", folder.size(name)
    if size == 0:
        raise TensorkeepError("is empty", where=where, code="F02", hint="use the checkpoint before it")
    if name.endswith(".safetensors"):
        read_header(folder, name)
        return
    if name.endswith(".json"):
        document = parse_json(read_small_from(folder, name), where)
        if not isinstance(document, dict) or (name == "trainer_state.json" and "global_step" not in document):
            raise TensorkeepError("holds no trainer's state", where=where, code="F07")
        return
    head = folder.read(name, 0, min(size, 4))
    if head[:2] == b"PK":
        bad = bad_entries(folder, name, 0, size) if whole else zip_entries(folder, name, 0, size) and []
        if bad:
            raise TensorkeepError(f"{bad[0]} does not fit its own CRC-32", where=where, code="F03")
    elif known and head[:1] != b"\x80":  # before torch 1.6 a pickle came first
        raise TensorkeepError("is neither an archive of torch.save nor a pickle", where=where, code="F02")


def bad_entries(folder: Folder, file: str, start: int, length: int) -> list[str]:
    """Read every entry of a torch.save archive and list those whose bytes do not fit the CRC-32 in the zip.

    Args:
        folder: where the file lies.
        file: its name.
        start: first byte of the archive in the file.
        length: bytes of the archive.

    Raises:
        TensorkeepError: F02 or F07 where the archive itself is damaged.
    """
    bad = []
    for name, entry in zip_entries(folder, file, start, length).items():
        crc = at = 0
        while at < entry.size:
            piece = folder.read(file, entry.start + at, min(STREAM_BYTES, entry.size - at))
            crc, at = zlib.crc32(piece, crc), at + len(piece)
        if crc != entry.crc and entry.crc:  # some writers leave it 0
            bad.append(name)
    return bad
