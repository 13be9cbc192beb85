"""Make checkpoint folders that another library writes trustworthy: fsync, digest and seal them, find the newest valid.

Their writers know neither digests nor fsync and write in place, so a folder is believed only once it is sealed: the
manifest comes last, covers every byte of every file, and is gone or differs wherever a save was cut short.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from logging import Logger
from pathlib import Path

from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import seals
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.storage.files import TEMPORARY, explained, left_over
from tensorkeep.storage.overwriting import Kind, listed
from tensorkeep.storage.placement import remove, replacing, sync_folder, temporary_name, write_bytes
from tensorkeep.storage.record import FROM_TORCH
from tensorkeep.storage.run_manifest import MANIFEST
from tensorkeep.training import saver as checkpoint
from tensorkeep.training.saver import State
from tensorkeep.training.state_files import files_of, floating, source_of, tensors_in

_Numbered = tuple[int, Path]


def _not_sealed(path: Path) -> list[str]:
    """List what in a folder our seal does not cover; all of it where there is no seal. A damaged one was ours."""
    if not path.is_dir() or not (path / MANIFEST).is_file():
        return listed(path) if path.is_dir() else [path.name]
    try:
        covered = run_manifest.read_manifest(path).files
    except TensorkeepError:
        return []
    return [name for name in listed(path) if name != MANIFEST and name not in covered]


SEALED = Kind("a sealed checkpoint", _not_sealed)


# -- tensors of our own beside theirs ---------------------------------------------------------------------------------


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file into a folder, durably.

    Raises:
        TensorkeepError: NaN or Inf (V01), or a tensor cannot be stored.
    """
    layout, own = files_of(State(dict(tensors), {}, {}, {"step": 0}))[0]
    dtypes = {n: FROM_TORCH[str(t.dtype).removeprefix("torch.")] for n, t in own.items()}
    floats = {n: d for n, d in dtypes.items() if floating(d)}
    with explained(folder / name):
        remove(folder / name)
        done = durable.write_file(folder / name, layout, source_of(own), floats)
    if done.unsound:
        raise seals.not_finite(folder / name, done.unsound)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of one file of a sealed folder to the CPU, every byte compared with its digest.

    Raises:
        TensorkeepError: F01 no manifest, F03 damaged (names the tensors), F05 the file is none of the checkpoint's.
    """
    folder = Path(folder)
    manifest = run_manifest.read_manifest(folder)
    if name not in manifest.files:
        raise TensorkeepError(f"{name} is no part of this checkpoint", where=folder, code="F05")
    run_manifest.check_sizes(folder, manifest)
    size = manifest.files[name].size
    image = durable.allocate(size)
    run_manifest.read_whole(folder, name, manifest, image)
    return tensors_in(folder, name, image[:size], manifest)


def write_state(final: Path, state: State) -> None:
    """Write one checkpoint of ours as the folder `final`, whatever its name; what was there goes once it is durable.

    Raises:
        TensorkeepError: as `training.saver.save` does.
    """
    with replacing(final, overwrite=True) as temporary:
        run = temporary_name(final)
        try:
            made = checkpoint.save(run, state)
            with explained(final):
                made.rename(temporary)
        except TensorkeepError as error:
            error.where = str(final)  # nobody knows the temporary names
            raise
        finally:
            remove(run)


def write_document(folder: Path, name: str, data: bytes) -> None:
    """Write a small file into a folder that is yet to be sealed."""
    with explained(folder / name):
        remove(folder / name)
        write_bytes(folder / name, data)


# -- finding and keeping ------------------------------------------------------------------------------------------


def numbered(root: Path, pattern: re.Pattern[str]) -> list[_Numbered]:
    """List the folders in `root` whose whole name fits `pattern`, with the number in it, highest first."""
    with explained(root):
        if not root.is_dir():
            return []
        found = [(int(m[1]), p) for p in root.iterdir() if (m := pattern.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def newest_sealed(folders: Sequence[Path], log: Logger) -> Path | None:
    """Return the first folder whose every byte is what its manifest says; those passed over are logged and stay.

    None where there is none, or nothing but one save that was cut short.

    Raises:
        TensorkeepError: there are checkpoints and none is valid: starting anew would end in overwriting them.
    """
    passed = []
    for folder in folders:
        wrong = [f for f in seals.findings(folder) if f.severity == "error"]
        if not wrong:
            return folder
        passed.append(wrong[0])
        log.warning("skipped: %s %s", wrong[0].code, wrong[0].message)
    if len(passed) > 1 or any(f.code != "F01" for f in passed):
        raise TensorkeepError(
            f"none of its {len(passed)} checkpoints is valid; the newest: {passed[0].message}",
            where=folders[0].parent,
            code=passed[0].code,
            tensors=passed[0].tensors,
            hint="resume from one by its path if you trust it (`seal` vouches for it), or start in another folder",
        )
    return None


def prune_folders(folders: Sequence[_Numbered], step: int, last: int, kept: set[int]) -> list[Path]:
    """Delete sealed folders up to `step`, except the `last` newest, `step` and `kept`.

    They are renamed away first, durably. A folder without a manifest was never ours to delete.
    """
    sealed = {s: path for s, path in folders if s <= step and (path / MANIFEST).is_file()}
    gone = [sealed[s] for s in run_folder.unwanted(list(sealed), last, None, kept | {step})]
    for path in gone:
        take_away(path)
    return gone


def take_away(path: Path) -> None:
    """Delete a folder so that no reader ever finds a half of it; a link or a file is unlinked."""
    aside = temporary_name(path)
    with explained(path):
        path.rename(aside)
        sync_folder(path.parent)
    remove(aside)


def clear_remains(root: Path, pattern: re.Pattern[str]) -> None:
    """Remove what a killed save or deletion of such folders left in `root`."""
    for name in left_over(root):
        if pattern.fullmatch(name[1 : -len(TEMPORARY)].rpartition(".")[0]):
            remove(root / name)
