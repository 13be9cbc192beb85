"""The checkpoints of a training run on disk: `RUN/checkpoints/step-000123/`, `latest`, `best`, and a lock.

A step folder comes into being by a rename and goes by one, so it is never seen half-written or half-deleted. `latest`
names a step for people; readers take the highest one that is valid, whatever `latest` says.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tensorkeep.errors import TensorkeepError, shown, word
from tensorkeep.findings import Finding
from tensorkeep.storage import durable
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import explained, left_over, open_plain
from tensorkeep.storage.manifest_hosts import PART
from tensorkeep.storage.placement import remove, sync_folder, temporary_name
from tensorkeep.storage.run_manifest import (
    MANIFEST,
    Manifest,
    as_finding,
    check_head,
    check_sizes,
    read_manifest,
    read_whole,
    step_name,
    step_of,
)

CHECKPOINTS, STATE = "checkpoints", "state.json"
MODEL, ADAPTER, OPTIMIZER, EMA = "model.safetensors", "adapter.safetensors", "optimizer.safetensors", "ema.safetensors"
METADATA = ".metadata"  # of a checkpoint in shards, instead of the three files before
LATEST, BEST, LOCK = "latest", "best", ".lock"
_PID = re.compile(rb"(\d{1,20}\n?)?")  # all that a lock file ever holds


# -- names --------------------------------------------------------------------------------------------------------


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of one step of a run, there or not.

    Args:
        run: the run's folder.
        step: the optimizer step.

    Example:
        >>> str(folder_of(Path("out"), 123))
        'out/checkpoints/step-000123'
    """
    return run / CHECKPOINTS / step_name(step)


def steps(run: Path) -> list[int]:
    """Return the steps of a run that have a folder, newest first; whether they are whole is another question.

    Args:
        run: the run's folder; one without checkpoints has no steps.
    """
    place = run / CHECKPOINTS
    with explained(place):
        if not place.is_dir():
            return []
        return sorted((s for p in place.iterdir() if (s := step_of(p.name)) is not None and p.is_dir()), reverse=True)


class OpenedCheckpoint(NamedTuple):
    """A checkpoint of a run, ready to be read.

    Attributes:
        path: its step folder.
        files: names of the files to read as one view.
        passed: findings about newer steps that were passed over because they are not whole.
        run: its position in the run as state.json has it: step, samples, epoch, world_size, those that are there.
        manifest: its manifest.
    """

    path: Path
    files: list[str]
    passed: list[Finding]
    run: dict[str, Any]
    manifest: Manifest


def find_checkpoint(path: Path) -> tuple[Path, list[Finding]] | None:
    """Find the checkpoint that a path means: a step folder itself, or the newest complete one of a run.

    Args:
        path: a step folder, a run's folder, or its `checkpoints` folder.

    Returns:
        The step folder and findings about newer steps that are not whole; None where the path is neither.

    Raises:
        TensorkeepError: none of the run's checkpoints is whole; the code says what is wrong with the newest.
    """
    run = path.parent if path.name == CHECKPOINTS else path
    with explained(run):
        has = (run / CHECKPOINTS).is_dir()
    if has and (newest := _newest_complete(run)) is not None:
        return newest
    with explained(path):
        names = [p.name for p in path.iterdir()] if path.is_dir() else []
    return (path, []) if _is_step(path, names) else None


def open_checkpoint(path: Path) -> OpenedCheckpoint | None:
    """Open the checkpoint that a path means, reading everything but the tensors' data.

    Manifest, file sizes, the weights' header and the position in the run are checked.

    Args:
        path: a step folder, or a run's folder.

    Returns:
        What to read of it; None where the path is neither.

    Raises:
        TensorkeepError: F01, F02, F03, F05 or F07 where one of these is not whole.
    """
    found = find_checkpoint(path.resolve())
    if found is None:
        return None
    folder, passed = found
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    document = {}
    if STATE in manifest.files:
        read_whole(folder, STATE, manifest)
        with explained(folder / STATE), os.fdopen(open_plain(folder / STATE, os.O_RDONLY), "rb") as file:
            document = parse_json(file.read(), folder / STATE)
    numbers = ("step", "epoch", "samples", "world_size")
    run = {k: document[k] for k in numbers if isinstance(document, dict) and type(document.get(k)) is int}
    name = weights_file(list(manifest.files))
    if name is not None:
        check_head(folder, name, manifest)
    files = [name] if name else [p.name for p in folder.iterdir() if p.is_file()]
    return OpenedCheckpoint(folder, files, passed, run, manifest)


def _is_step(folder: Path, names: Sequence[str]) -> bool:
    """Tell whether a folder with these files is a checkpoint of a run, finished or not."""
    return (MANIFEST in names and STATE in names) or (
        step_of(folder.name) is not None and folder.parent.name == CHECKPOINTS and ".metadata" not in names
    )


def weights_file(names: Sequence[str]) -> str | None:
    """Return the file of a checkpoint that holds the weights; None where they lie in another format (DCP).

    Args:
        names: the files of the checkpoint.
    """
    return next((n for n in (MODEL, ADAPTER) if n in names), None)


def _newest_complete(run: Path) -> tuple[Path, list[Finding]] | None:
    """Find the newest checkpoint whose manifest and sizes are right, and say what was passed over.

    None where `run` has no step. Content is not read: `verify` and a resume do that.
    """
    found, skipped = steps(run), []
    for step in found:
        try:
            check_sizes(folder_of(run, step), read_manifest(folder_of(run, step)))
        except TensorkeepError as error:
            skipped.append(as_finding(error, "warning"))
            continue
        return folder_of(run, step), skipped
    if found:
        raise TensorkeepError(
            f"none of its {len(found)} checkpoints is whole; the newest: {skipped[0].message}",
            where=run,
            code=skipped[0].code,
            hint=skipped[0].fix if PART in skipped[0].message else "see `tensorkeep verify` of each",
        )
    return None


def remains(run: Path) -> list[str]:
    """Return the temporary names that an interrupted save left in a run, sorted.

    Args:
        run: the run's folder.
    """
    return left_over(run / CHECKPOINTS)


# -- latest, best, pruning ----------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step, durably.

    `best` needs the last fsync: who is told that a step is the best one counts on it. `latest` could do without, since
    no reader relies on it; its fsync runs beside training.

    Args:
        path: the file, there or not.
        text: its new content.

    Raises:
        OSError: as the system gives it; the old file is then untouched.
    """
    temporary = temporary_name(path)
    try:
        durable.write_small(temporary, text.encode())
        os.rename(temporary, path)  # noqa: PTH104  the fault-injecting tests count os-level calls
    except BaseException:
        remove(temporary)
        raise
    sync_folder(path.parent)


def named_step(run: Path, which: str) -> int | None:
    """Return the step that `latest` or `best` names; None where there is no such file.

    Args:
        run: the run's folder.
        which: LATEST or BEST.

    Raises:
        TensorkeepError: F07 where the file names no step.
    """
    path = run / CHECKPOINTS / which
    with explained(path):
        if not os.path.lexists(path):
            return None
        with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
            text = file.read(64).decode("utf-8", "replace").strip()
    step = step_of(text)
    if step is None:
        raise TensorkeepError(
            f"names no step: {shown(text)}",
            where=path,
            code="F07",
            hint=f"write the name of a step into it, or rm {word(path)}",
        )
    return step


def unwanted(found: Sequence[int], last: int, every: int | None, kept: set[int]) -> list[int]:
    """Choose the steps to delete.

    Args:
        found: the steps that are there.
        last: how many of the newest to keep, at least 1.
        every: keep multiples of this number too; None for no more.
        kept: steps to keep in any case.

    Returns:
        The steps that nothing asks to keep.

    Example:
        >>> unwanted([50, 40, 30, 20, 10], last=2, every=20, kept={10})
        [30]
    """
    newest = sorted(found, reverse=True)[: max(last, 1)]
    return [s for s in found if s not in newest and s not in kept and not (every and s % every == 0)]


def delete(run: Path, gone: Sequence[int]) -> list[Path]:
    """Delete steps of a run; they are renamed away first, durably, so that no reader ever finds half of one.

    Journals keep the order of a rename and what follows; POSIX does not promise it, hence the fsync between them.

    Args:
        run: the run's folder.
        gone: the steps to delete.

    Returns:
        The folders that are gone.
    """
    paths = [folder_of(run, step) for step in gone]
    aside = []
    for path in paths:
        aside.append(temporary_name(path))
        os.rename(path, aside[-1])  # noqa: PTH104
    if aside:
        sync_folder(run / CHECKPOINTS)
    for path in aside:
        remove(path)
    return paths


# -- one writer a run ---------------------------------------------------------------------------------------------

held: dict[tuple[int, str], None] = {}  # (pid, run): a record lock does not keep its own process out


@contextmanager
def locked(run: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold RUN/.lock for the body, so that one process at a time saves into a run.

    A record lock (`lockf`), not `flock`: data-loading processes inherit the latter when they are forked, and would
    hold it on after a kill of the run itself.

    Args:
        run: the run's folder; made where it is not there.
        wait: seconds that its holder may take to go; a file server keeps the lock of a lost host for a while.

    Yields:
        Nothing.

    Raises:
        TensorkeepError: another process, which is named, or this one holds the lock; or the file is a link or not ours,
            and stays as it is.
    """
    path, mine = run / LOCK, (os.getpid(), str(run.resolve()))
    if mine in held:
        raise TensorkeepError("this process saves into it already", where=run, hint="close the other Saver first")
    with explained(run):
        make_folder(run)
    with explained(path):
        handle = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        with explained(path):
            if not _PID.fullmatch(os.pread(handle, 64, 0)):
                what = "is a file of somebody else's, where a run keeps its lock"
                raise TensorkeepError(what, where=path, hint="move it away, or choose another --out")
            end = time.monotonic() + wait
            while True:
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):  # EAGAIN, or EACCES on some systems
                    if time.monotonic() >= end:
                        pid = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                        what = f"process {pid or 'unknown'} saves into it"
                        raise TensorkeepError(what, where=run, hint="wait for it, or choose another --out") from None
                    time.sleep(0.2)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        held[mine] = None
        try:
            yield
        finally:
            held.pop(mine, None)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably.

    Args:
        folder: the folder; it may exist.
    """
    new = [p for p in (folder, *folder.parents) if not p.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        sync_folder(path.parent)


def room_for(run: Path, needed: int) -> None:
    """Raise where the file system has too little room, before anything is written.

    Args:
        run: the run's folder.
        needed: bytes to be written.

    Raises:
        TensorkeepError: the disk is full.
    """
    with explained(run):
        free = free_bytes(run)
    if free < needed:
        raise disk_full(run, needed, free)


def disk_full(run: Path, needed: int, free: int) -> TensorkeepError:
    """Return the error for a checkpoint that does not fit on the disk.

    Args:
        run: the run's folder.
        needed: bytes to be written.
        free: bytes that are left.
    """
    return TensorkeepError(
        f"the disk is full: a checkpoint needs {needed:,} bytes, {free:,} are free",
        where=run,
        hint="free space, or keep fewer checkpoints; the old ones are untouched",
    )


def free_bytes(run: Path) -> int:
    """Return the bytes left on a folder's file system; a part of it is the superuser's alone.

    Args:
        run: the folder.
    """
    system = os.statvfs(run)
    return system.f_frsize * (system.f_bfree if os.geteuid() == 0 else system.f_bavail)
