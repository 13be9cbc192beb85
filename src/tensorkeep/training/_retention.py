"""Which checkpoints of a run stay: the newest, the best, and those kept for ever; the others are deleted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.run_folder import BEST, CHECKPOINTS


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a run stay; the best and the newest valid one always do.

    Args:
        last: so many of the newest.
        every: those whose step is a multiple of this, for ever (None: none).
    """

    last: int = 3
    every: int | None = None


def mark_best(run: Path, step: int) -> None:
    """Name a step the best, so that it is never deleted.

    Raises:
        TensorkeepError: the step has no folder (F05).
    """
    folder = run_folder.folder_of(Path(run), step)
    if not folder.is_dir():
        raise TensorkeepError("no such checkpoint", where=folder, code="F05")
    with explained(folder.parent):
        run_folder.write_text(folder.parent / BEST, folder.name + "\n")


def best(run: Path) -> int | None:
    """Read which step was named the best.

    Args:
        run: the run's folder.

    Returns:
        The step, None where none was named.

    Raises:
        TensorkeepError: the file `best` names no step (F07).
    """
    return run_folder.named_step(Path(run), BEST)


def prune(run: Path, keep: Keep) -> list[Path]:
    """Delete the checkpoints that `keep` does not keep; the newest are read until a valid one is found.

    Returns:
        The folders that were deleted.
    """
    run = Path(run)
    found = run_folder.steps(run)
    whole = next((s for s in found if not run_manifest.findings(run_folder.folder_of(run, s))), None)
    return delete_unwanted(run, keep, whole)


def delete_unwanted(run: Path, keep: Keep, whole: int | None) -> list[Path]:
    """Delete what need not stay beside `whole`, a step known to be valid; without one nothing is deleted."""
    if whole is None:
        return []
    kept = {whole, *([named] if (named := best(run)) is not None else [])}
    gone = run_folder.unwanted(run_folder.steps(run), keep.last, keep.every, kept)
    with explained(run / CHECKPOINTS):
        return run_folder.delete(run, gone)
