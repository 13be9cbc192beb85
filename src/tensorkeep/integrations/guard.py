"""Seal what any trainer saves, and find the newest save that is whole: one call, whatever program writes.

    guard = tensorkeep.guard("runs/x")
    trainer.train(resume_from_checkpoint=guard.resume_path())
    ...
    guard.seal("runs/x/checkpoint-500")     # when the save is finished on every process; on one process

It knows the folders of transformers' Trainer (FSDP and DeepSpeed inside), accelerate, torchtitan and plain
torch.distributed.checkpoint, torch_checkpointing, DeepSpeed, and Lightning's `.ckpt`. torch is not needed.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import NamedTuple

from tensorkeep.diagnosis.evidence.resume_files import cut_files
from tensorkeep.errors import TensorkeepError
from tensorkeep.findings import Finding
from tensorkeep.formats import seals
from tensorkeep.formats.saves import saves_in, step_at, unfinished
from tensorkeep.storage.files import explained, local_path

log = logging.getLogger(__name__)
_SETTLED = 1.0  # seconds without a change, before a save that nobody vouches for is taken to be finished


class Sealed(NamedTuple):
    """What `Guard.seal` did.

    Attributes:
        paths: the saves sealed now, newest first.
        left: why others have no seal, one finding each.
    """

    paths: list[Path]
    left: list[Finding]


class Newest(NamedTuple):
    """What `Guard.newest` found.

    Attributes:
        path: the newest save whose bytes equal its seal; None where there is none.
        skipped: what is wrong with newer ones (of all where there is none): F01 without a seal, F02, F03, F05, F07.
    """

    path: Path | None
    skipped: list[Finding]


def guard(folder: str | Path) -> Guard:
    """Watch over the folder into which a training program writes its saves.

    Args:
        folder: the program's output folder, or the folder of its saves. It need not exist yet.

    Returns:
        The guard, which holds no state but the folder: another process, or a later one, sees the same.

    Example:
        >>> guard("runs/not-there").newest()
        Newest(path=None, skipped=[])
    """
    return Guard(local_path(folder))


class Guard:
    """Seals the saves in a folder, and finds the newest whole one. `guard` makes it.

    Args:
        folder: where the saves lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seal(self, save: str | Path | None = None) -> Sealed:
        """Seal one save that is finished, or every finished one that has no seal yet.

        Call it on one process, after the program's own save has returned on all (an asynchronous one: after it is
        done). What shows that it was cut short is refused in both cases: a file that ends early, a part or a process's
        file missing. Without `save` it must also hold a file that its program writes last, have the same kinds of
        files as the newest sealed save, and have stood unchanged for a second; a sealed save is left as it is.

        Args:
            save: the save, or its name in the folder: you vouch that its program has finished it, and it is sealed
                anew where it differs from its seal. None: all that are new and finished.

        Returns:
            The saves sealed, and why others were not.

        Raises:
            TensorkeepError: `save` is cut short (F01, F02, F03, F05, F07), holds NaN or Inf (V01), is written to
                meanwhile (F01), or the disk is full or fails. It has no seal then.
        """
        if save is not None:
            path = self._place(save)
            if (wrong := _cut_short(path, vouched=True)) is not None:
                what = wrong.message.removeprefix(f"{path}: ")
                raise TensorkeepError(what, where=path, code=wrong.code, hint=wrong.fix, tensors=wrong.tensors)
            if seals.findings(path):  # a whole seal may say more than this one would: a base, shards
                seals.seal(path, step_at(path))
            return Sealed([path], [])
        done, left = [], []
        for found in saves_in(self.folder):
            if seals.is_sealed(found.path):
                continue
            wrong = self._sealed_or_why(found.path)
            if wrong is None:
                done.append(found.path)
            else:
                left.append(wrong)
                log.warning("not sealed: %s %s", wrong.code, wrong.message)
        return Sealed(done, left)

    def newest(self) -> Newest:
        """Find the newest save whose every byte is what its seal says. Reads it, and newer ones that are sealed.

        What is passed over stays as it is, and is logged as a warning.

        Returns:
            Its path, None where there is none, and what was passed over and why.
        """
        skipped: list[Finding] = []
        for found in saves_in(self.folder):
            wrong = [f for f in seals.findings(found.path) if f.severity == "error"]
            if not wrong:
                return Newest(found.path, skipped)
            skipped += wrong
            log.warning("skipped: %s %s", wrong[0].code, wrong[0].message)
        return Newest(None, skipped)

    def resume_path(self) -> str | None:
        """Return what to resume from: `newest`'s path as text, or None to start anew.

        Returns:
            The path; None where there is no save, or nothing but one that was cut short (the first one).

        Raises:
            TensorkeepError: there are saves and none is whole: starting anew would end in overwriting them.
        """
        path, skipped = self.newest()
        first = saves_in(self.folder) if path is None else []
        if len(first) > 1 or any(seals.is_sealed(s.path) or _cut_short(s.path) is None for s in first):
            raise TensorkeepError(
                f"none of its saves is whole; the newest: {skipped[0].message}",
                where=self.folder,
                code=skipped[0].code,
                tensors=skipped[0].tensors,
                hint="`seal` one by its path if you trust it, or train into another folder",
            )
        return None if path is None else str(path)

    def _place(self, save: str | Path) -> Path:
        """Return the save that was named, by a path or by its name in the folder."""
        named = local_path(save)
        path = named if named.exists() or not (self.folder / named).exists() else self.folder / named
        with explained(path):
            path.stat()
        if path.is_symlink():
            raise TensorkeepError("is a symbolic link", where=path, hint="name the save itself")
        return path

    def _sealed_or_why(self, save: Path) -> Finding | None:
        """Seal a save that shows no sign of being unfinished; say why where it is the save that stands against it."""
        try:
            wrong = _cut_short(save) or self._differs(save) or _unsettled(save)
            if wrong is None:
                seals.seal(save, step_at(save))
        except TensorkeepError as error:
            if error.code is None:
                raise
            return Finding(error.code, "error", f"{error.where}: {error.what}", error.tensors, fix=error.hint)
        return wrong

    def _differs(self, save: Path) -> Finding | None:
        """Say which kind of file a save lacks that the newest sealed one of the same folder has."""
        known = next((s.path for s in saves_in(self.folder) if seals.is_sealed(s.path) and s.path.is_dir()), None)
        if known is None or not save.is_dir():
            return None
        has = {_kind(name) for name in seals.files_in(save)}
        lost = [name for name in seals.files_in(known) if name.endswith(seals.LOADED) and _kind(name) not in has]
        if not lost:
            return None
        what = f"{save}: has no {', '.join(lost[:3])}, which {known.name} has"
        return Finding("F05", "error", what, lost, fix=f"guard.seal({str(save)!r}) where this is meant to be")


def _kind(name: str) -> str:
    """Return a file's name without its numbers, which differ from save to save."""
    return re.sub(r"\d+", "*", name)


def _cut_short(save: Path, vouched: bool = False) -> Finding | None:
    """Say what shows that a save is not all there."""
    if (why := unfinished(save, vouched)) is not None:
        return Finding("F01", "error", f"{save}: {why}", fix="wait for its writer, or use the save before it")
    found = next(iter(cut_files(save)), None)
    return (
        None
        if found is None
        else Finding(found.code, "error", f"{save}: {found.message}", found.tensors, fix=found.fix)
    )


def _unsettled(save: Path) -> Finding | None:
    """Wait until a save has stood unchanged for a second; say where it has not."""
    before = seals.states(save)
    newest = max(state[2] for state in before.values()) / 1e9
    if (wait := newest + _SETTLED - time.time()) > 0:
        time.sleep(min(wait, _SETTLED))
        if seals.states(save) != before:
            return Finding("F01", "error", f"{save}: is being written", fix="seal it when its writers are done")
    return None
