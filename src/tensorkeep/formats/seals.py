"""Seals of saves that other programs wrote: a manifest of every file's digests, beside their files and written last.

Their writers know neither digests nor fsync and write in place, so a save is believed only once it is sealed: every
file of it is on the disk, and the manifest covers every byte of every file, folders within folders included. In a
folder the seal is `manifest.json`; beside a lone `x.ckpt` it is `.x.ckpt.manifest.json`, since Lightning takes every
name that begins with `last.ckpt` for one of its own. No file of theirs is written, renamed or deleted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats import safetensors
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.storage.budget import read_small
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import TEMPORARY, LocalFolder, Progress, explained, left_over, open_plain
from tensorkeep.storage.finite import all_finite
from tensorkeep.storage.leftovers import KEPT
from tensorkeep.storage.overwriting import listed
from tensorkeep.storage.placement import remove, sync_file, sync_folder
from tensorkeep.storage.record import DTYPES
from tensorkeep.storage.run_manifest import MANIFEST

Places = dict[str, tuple[str, tuple[int, ...], int]]  # name -> dtype, shape, first byte
# what a load or a resume may open, by the end of its name; anything else that turns up later does no harm
LOADED = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors", ".distcp", ".metadata", ".index.json")
_NAMES = ("latest", "trainer_state.json")
_THREADS = 4


def seal_of(save: Path) -> Path:
    """Return where the seal of a save lies, or would lie.

    Args:
        save: a folder, or a lone file.

    Example:
        >>> str(seal_of(Path("checkpoints/last.ckpt")))
        'checkpoints/.last.ckpt.manifest.json'
    """
    return save / MANIFEST if save.is_dir() else save.with_name(f".{save.name}.{MANIFEST}")


def is_sealed(save: Path) -> bool:
    """Tell whether a save carries a seal of ours, whole or damaged; another program's `manifest.json` is none.

    Args:
        save: a folder, or a lone file.
    """
    path = seal_of(save)
    if not path.is_file() or path.stat().st_size > run_manifest.LARGEST_MANIFEST:
        return False
    data, ours = read_small(path, run_manifest.LARGEST_MANIFEST), ("schema", "chunk", "files", "xxh3_128")
    try:
        document = parse_json(data, path)
    except TensorkeepError:  # damaged, which is for the manifest's own digest to say
        return sum(f'"{key}":'.encode() in data for key in ours) >= len(ours) - 1
    return isinstance(document, dict) and set(ours) <= document.keys()


def files_in(save: Path) -> list[str]:
    """List the files of a save as its seal names them.

    Args:
        save: a folder, or a lone file.

    Returns:
        The files at every depth, sorted; without the seal and temporary names of ours.
    """
    if not save.is_dir():
        return [save.name]
    return [n for n in listed(save) if n not in (MANIFEST, ".") and not n.endswith((TEMPORARY, "/."))]


# -- sealing --------------------------------------------------------------------------------------------------------


def seal(save: Path, step: int, base: Mapping[str, Any] | None = None, only: Collection[str] | None = None) -> None:
    """Put every file of a save on the disk for good, and our manifest beside them, last.

    Safetensors are digested tensor by tensor and looked through. An earlier seal goes first, so that a kill at any
    instant leaves no seal, or the new one.

    Args:
        save: a folder, or a lone file.
        step: what the manifest says it was saved at.
        base: what identifies frozen weights that are not in it.
        only: names of the files that are sealed, where others write into the save meanwhile; None: all.

    Raises:
        TensorkeepError: a tensor holds NaN or Inf (V01), the save is empty, holds a link or changes meanwhile, a
            `manifest.json` of another program is in the way, or the disk is full or fails. It stays without a seal.
    """
    save, place = Path(save), seal_of(Path(save))
    _forget(save, place)
    home = save if save.is_dir() else save.parent
    before = _states(save, only)
    written: dict[str, durable.Written] = {}
    tensors: dict[str, Places] = {}
    for name in before:
        sync_file(home / name)
        written[name], places = _digested(home, name)
        if places:
            tensors[name] = places
        if written[name].unsound:
            raise not_finite(home / name, written[name].unsound)
    for folder in sorted({home / parent for name in before for parent in Path(name).parents}, reverse=True):
        sync_folder(folder)
    if (after := _states(save, only)) != before:
        changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
        what = f"changed while it was sealed: {', '.join(changed[:3])}"
        raise TensorkeepError(what, where=save, code="F01", hint="seal it when its writers are done")
    with explained(place):
        run_folder.write_text(place, run_manifest.make_manifest(step, written, tensors, base).decode())
        sync_folder(save.parent)


def _states(save: Path, only: Collection[str] | None) -> dict[str, tuple[int, int, int]]:
    """Return the states of the files that are sealed."""
    return {name: state for name, state in states(save).items() if only is None or name in only}


def _forget(save: Path, place: Path) -> None:
    """Remove an earlier seal, and what a killed seal left: what is written into again is not sealed."""
    with explained(save):
        save.stat()
    if os.path.lexists(place):
        if not is_sealed(save):
            what = f"holds a {place.name} of another program, where its seal would lie"
            raise TensorkeepError(what, where=save, code="F07", hint="nothing was changed: move that file away")
        remove(place)
    for name in left_over(place.parent):
        if save.is_dir() or name.startswith(f".{place.name[:KEPT]}."):
            remove(place.parent / name)
    sync_folder(place.parent)


def states(save: Path) -> dict[str, tuple[int, int, int]]:
    """List the files of a save, each with what tells that it was written to.

    Args:
        save: a folder, or a lone file.

    Returns:
        File name -> inode, size in bytes, time of change in nanoseconds.

    Raises:
        TensorkeepError: it is empty (F01), or holds a link.
    """
    home = save if save.is_dir() else save.parent
    found: dict[str, tuple[int, int, int]] = {}
    for name in files_in(save):
        with explained(home / name):
            handle = open_plain(home / name, os.O_RDONLY)
            try:
                state = os.fstat(handle)
            finally:
                os.close(handle)
        found[name] = (state.st_ino, state.st_size, state.st_mtime_ns)
    if not found:
        raise TensorkeepError("is empty", where=save, code="F01", hint="seal what its program has finished writing")
    return found


def not_finite(where: Path, names: list[str]) -> TensorkeepError:
    """Return the error for tensors with NaN or Inf.

    Args:
        where: the file.
        names: the tensors.
    """
    first = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return TensorkeepError(
        f"NaN or Inf in {len(names)} tensors: {first}; the checkpoints before it stay",
        where=where,
        code="V01",
        hint="resume from the newest valid checkpoint with a lower learning rate or clipping",
        tensors=names,
    )


def _digested(folder: Path, name: str) -> tuple[durable.Written, Places]:
    """Digest a file that is there already; of safetensors also each tensor, and list those with NaN or Inf."""
    path = folder / name
    size, chunks = _chunks(path)
    places: Places = {}
    digests, unsound = {}, []
    if name.endswith(".safetensors"):
        records, _ = safetensors.read_header(LocalFolder(path.parent), path.name)
        places = {r.name: (r.dtype, r.shape, r.blocks[0].start if r.blocks else 0) for r in records}
        with explained(path), path.open("rb") as file:
            for record in records:
                file.seek(places[record.name][2])
                digests[record.name], sound = _passed(file, record.nbytes, record.dtype)
                if not sound:
                    unsound.append(record.name)
    return durable.Written(size, chunks, digests, sorted(unsound)), places


def _chunks(path: Path) -> tuple[int, list[str]]:
    """Return a file's size and the digest of its every 16 MiB, read by several threads."""
    with explained(path):
        handle = open_plain(path, os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size

            def one(start: int) -> str:
                running, end = xxhash.xxh3_128(), min(start + durable.CHUNK, size)
                while start < end and (piece := os.pread(handle, min(durable.CACHED, end - start), start)):
                    running.update(piece)
                    start += len(piece)
                return running.hexdigest()

            starts = range(0, size, durable.CHUNK)
            if len(starts) < 2:
                return size, [one(start) for start in starts]
            with ThreadPoolExecutor(_THREADS) as pool:
                return size, list(pool.map(one, starts))
        finally:
            os.close(handle)


def _passed(file: Any, left: int, dtype: str) -> tuple[str, bool]:
    """Read the next `left` bytes; return their digest, and whether they are finite."""
    running, sound = xxhash.xxh3_128(), True
    floating = DTYPES[dtype].floating or dtype.startswith("C")
    while left and (piece := file.read(min(left, durable.CACHED))):
        running.update(piece)
        sound = sound and (not floating or all_finite(memoryview(piece), dtype))
        left -= len(piece)
    return running.hexdigest(), sound


# -- is a save what its seal says? ----------------------------------------------------------------------------------


def findings(save: Path, progress: Progress | None = None) -> list[Finding]:
    """Compare every byte of a save with its seal.

    Args:
        save: a folder, or a lone file.
        progress: called after each file with ("verify", bytes done, bytes in all).

    Returns:
        One error for each file that is missing, cut or damaged; F01 where there is no seal; F07 for files of a kind
        that is loaded which the seal does not cover; an info for other files beside them. [] where the save is whole.
    """
    place = seal_of(save)
    if not os.path.lexists(place):
        what = f"{save}: has no seal: its save or its sealing was cut short, or nobody sealed it"
        return [Finding("F01", "error", what, fix="use the save before it; `seal` vouches for one that you trust")]
    found = run_manifest.findings(place.parent, progress, place.name)
    if found:
        return found
    try:
        extra = sorted(set(files_in(save)) - run_manifest.read_manifest(place.parent, place.name).files.keys())
    except TensorkeepError as error:  # its program deletes it meanwhile
        return [run_manifest.as_finding(error)]
    loaded = [n for n in extra if n.endswith(LOADED) or Path(n).name in _NAMES]
    if loaded:
        what = f"{save}: {', '.join(loaded[:3])}: written after its seal, which does not cover it"
        return [
            Finding("F07", "error", what, loaded, fix="use the save before it; `seal` vouches for what is there now")
        ]
    if extra:
        return [Finding("F07", "info", f"{save}: {', '.join(extra[:3])}: not covered by its seal", extra)]
    return []
