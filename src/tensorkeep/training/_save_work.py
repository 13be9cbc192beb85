"""One save on its way to the disk: the checkpoint's files written, put in place, and older checkpoints deleted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorkeep.errors import TensorkeepError
from tensorkeep.storage import durable, run_folder, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.storage.placement import remove, swap_names, sync_folder, temporary_name
from tensorkeep.storage.record import FROM_TORCH
from tensorkeep.storage.run_folder import CHECKPOINTS, LATEST, OPTIMIZER, STATE
from tensorkeep.storage.run_manifest import MANIFEST
from tensorkeep.training._retention import Keep, delete_unwanted
from tensorkeep.training.state_files import File, floating, source_of

if TYPE_CHECKING:
    from tensorkeep.training._staging import Staged


@dataclass
class Work:
    """One save on its way to the disk; nothing in it is the caller's, who may change the state meanwhile."""

    run: Path
    keep: Keep
    step: int
    base: dict[str, Any] | None
    not_captured: tuple[str, ...]
    files: list[File]
    document: bytes
    staged: Staged | None
    started: float
    first: Callable[[], None] | None
    seconds: float = field(default=0.0)

    def carry_out(self) -> Path:
        """Write the checkpoint and put it in place; it is durable when this returns.

        Errors of the system come out as TensorkeepErrors.
        """
        final = run_folder.folder_of(self.run, self.step)
        temporary = temporary_name(final)
        try:
            with explained(self.run):
                run_folder.make_folder(final.parent)
                if self.first is not None:
                    self.first()
                os.mkdir(temporary)  # noqa: PTH102  the fault-injecting tests count os-level calls
                self._write(temporary)
                sync_folder(temporary)
                if os.path.lexists(final):  # a damaged one that a resume passed over, or the same step again
                    swap_names(temporary.resolve(), final.resolve())
                else:
                    os.rename(temporary, final)  # noqa: PTH104
                sync_folder(final.parent)
                self.seconds = time.perf_counter() - self.started
        except TensorkeepError as error:
            needed = sum(layout.size for layout, _ in self.files) + len(self.document)
            raise told_full(self.run, needed, error) from None
        finally:
            remove(temporary)
        return final

    def tidy(self) -> None:
        """Name this checkpoint the latest and delete what need not stay; call it only after it is durable."""
        name_latest(self.run, self.keep, self.step)

    def _write(self, folder: Path) -> None:
        """Write every file of the checkpoint into a folder, the manifest last."""
        written: dict[str, durable.Written] = {}
        tensors: dict[str, dict[str, tuple[str, tuple[int, ...], int]]] = {}
        images = self.staged.wait() if self.staged is not None else {}
        for layout, own in self.files:
            dtypes = {n: FROM_TORCH[str(t.dtype).removeprefix("torch.")] for n, t in own.items()}
            source = images.get(layout.name) or source_of(own)
            looked = {} if layout.name == OPTIMIZER else {n: d for n, d in dtypes.items() if floating(d)}
            done = written[layout.name] = durable.write_file(folder / layout.name, layout, source, looked)
            if done.unsound:
                raise not_finite(folder, layout.name, done.unsound)
            tensors[layout.name] = {
                s.tensor: (dtypes[s.tensor], tuple(own[s.tensor].shape), s.start) for s in layout.slots
            }
        written[STATE] = durable.write_small(folder / STATE, self.document)
        manifest = run_manifest.make_manifest(self.step, written, tensors, self.base, self.not_captured)
        durable.write_small(folder / MANIFEST, manifest)


def name_latest(run: Path, keep: Keep, step: int) -> None:
    """Name a checkpoint the latest and delete what need not stay beside it; call it only after it is durable."""
    with explained(run / CHECKPOINTS):
        run_folder.write_text(run / CHECKPOINTS / LATEST, run_manifest.step_name(step) + "\n")
    delete_unwanted(run, keep, whole=step)


def told_full(run: Path, needed: int, error: TensorkeepError) -> TensorkeepError:
    """The error as it is, but with the bytes needed and free where the disk is full."""
    return run_folder.disk_full(run, needed, run_folder.free_bytes(run)) if "disk is full" in error.what else error


def not_finite(folder: Path, file: str, names: list[str]) -> TensorkeepError:
    """The error for tensors that hold NaN or Inf."""
    first = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return TensorkeepError(
        f"NaN or Inf in {len(names)} tensors of {file}: {first}; not saved, the checkpoints before it stay",
        where=folder.parent,
        code="V01",
        hint="resume from the newest checkpoint with a lower learning rate or clipping",
        tensors=names,
    )
