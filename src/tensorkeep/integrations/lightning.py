"""Lightning checkpoints that can be trusted: a CheckpointIO without pickle, and a callback for random states.

A `.ckpt` is then a folder like every checkpoint of ours: weights and other tensors as safetensors, the rest as one JSON
document, a manifest with digests; durable when the save returns, verified when it is loaded.

    Trainer(plugins=[TensorkeepCheckpointIO()], callbacks=[ModelCheckpoint(save_last=True), ExactResume()])
    trainer.fit(model, ckpt_path=newest_valid("checkpoints"))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from tensorkeep.errors import TensorkeepError
from tensorkeep.integrations import _folders as folders
from tensorkeep.integrations._plain import Encoder, decode_document
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.files import explained
from tensorkeep.training import distributed, randomness
from tensorkeep.training import saver as checkpoints
from tensorkeep.training.distributed import World
from tensorkeep.training.saver import State

log = logging.getLogger(__name__)
_SAVES = re.compile(r".+\.ckpt|.{40}")  # temporary names are cut at 40 letters


class TensorkeepCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoints as folders of ours.

    `model.safetensors` holds `state_dict` under its own names, so that `tensorkeep inspect`, `diff` and `convert` read
    the folder; other tensors are in `optimizer.safetensors`, everything else in `state.json`.

    Example:
        >>> Trainer(plugins=[TensorkeepCheckpointIO()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; it is durable when this returns.

        Args:
            checkpoint: what Lightning collected.
            path: the new folder.
            storage_options: must be None; they are for remote file systems.

        Raises:
            TensorkeepError: NaN or Inf in weights (V01), a value that cannot be kept without pickle (names its keys), a
                full or failing disk. What was at `path` stays then.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote file systems, TensorkeepCheckpointIO writes to a local one")
        encoder = Encoder("state_dict")
        document = {"step": int(checkpoint.get("global_step", 0)), "lightning": encoder.document(checkpoint)}
        tensors, parent = encoder.tensors, Path(path).parent
        with explained(path):
            run_folder.make_folder(parent)
        if parent not in self._cleared:  # what a run killed in here left
            folders.clear_remains(parent, _SAVES)
            self._cleared.add(parent)
        folders.write_state(Path(path), State(tensors["model"], tensors["rest"], {}, document))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, every byte compared with its digest.

        Args:
            path: a folder that `save_checkpoint` wrote.
            map_location: where tensors go, as `torch.load` takes it; None for the CPU.
            weights_only: changes nothing: no code can be in the folder.

        Returns:
            What Lightning collected.

        Raises:
            FileNotFoundError: nothing is at `path`.
            TensorkeepError: damaged tensors (F03, names them), a cut file (F02), a missing one (F05), or a file that
                another plugin wrote.
        """
        folder = Path(path)
        if not folder.exists():
            raise FileNotFoundError(f"Checkpoint not found: {path}")  # as every CheckpointIO does
        if not folder.is_dir():
            raise TensorkeepError(
                "is a file of Lightning's own, not a folder of TensorkeepCheckpointIO",
                where=folder,
                hint="resume once without the plugin and save with it, or read its weights with `tensorkeep convert`",
            )
        state = checkpoints.load(folder)
        place = _device(map_location)
        tensors = {"model": _moved(state.model, place), "rest": _moved(state.optimizer, place)}
        found = decode_document(state.document.get("lightning"), tensors, folder)
        if not isinstance(found, dict):
            raise TensorkeepError(
                "is a checkpoint, but none of Lightning's", where=folder, hint="see `tensorkeep inspect`"
            )
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, so that nobody finds a half of it; a link alone where it is one.

        Args:
            path: a checkpoint; nothing happens where there is none.
        """
        if Path(path).is_symlink() or Path(path).exists():
            folders.take_away(Path(path))


def newest_valid(dirpath: str | Path) -> str | None:
    """Find the `.ckpt` folder with the highest step that is whole, for `trainer.fit(ckpt_path=...)`.

    Reads every file. Folders passed over stay and are named in a warning.

    Args:
        dirpath: the folder of Lightning's ModelCheckpoint.

    Returns:
        The path; None where there is none, to start anew.

    Raises:
        TensorkeepError: there are checkpoints and all are damaged.
    """
    known: dict[int, Path] = {}
    unknown = []
    for path in sorted(Path(dirpath).glob("*.ckpt"), key=lambda p: p.name):
        if not path.is_dir() or path.is_symlink():
            continue
        try:
            step = run_manifest.read_manifest(path).step
        except TensorkeepError as error:
            unknown.append(error)
            log.warning("skipped: %s", error.line)
            continue
        if step not in known or run_manifest.findings(known[step]):  # last.ckpt and a numbered one may be the same step
            known[step] = path
    if unknown and not known:
        raise unknown[-1]
    found = folders.newest_sealed([known[step] for step in sorted(known, reverse=True)], log)
    return None if found is None else str(found)


class ExactResume(Callback):
    """Makes the random numbers of training (dropout) a part of the checkpoint: python, numpy and torch, every process.

    Lightning saves none, and a resume neither repeats an evaluation that came after the save nor makes the same
    iterators. So between two batches the states are kept and put back: evaluation and loaders draw what they like,
    and whenever a checkpoint is made, the next batch sees what it would have seen. Order and augmentation of the data
    are the loader's: functions of the seed and the sample (`tensorkeep.training.randomness.order`, `.generator`).
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None  # after the last batch; None before the first

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the states of an earlier fit that this callback served."""
        self._state = None  # the callback may have served another fit

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of every process, for the checkpoint."""
        return {"random": distributed.gathered(_world(), self._state or randomness.capture())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's random states out of a checkpoint; they are put back before the next batch."""
        world, saved = _world(), state_dict["random"]
        if world.size != len(saved):
            log.warning("random states of %s processes, %s are here: they draw other numbers", len(saved), world.size)
        self._state = saved[world.rank] if world.rank < len(saved) else None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put back the random states that the last batch ended with."""
        if self._state is not None:
            randomness.restore(self._state)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the random states that this batch ends with."""
        self._state = randomness.capture()


def _world() -> World:
    """Return this process's rank and how many there are."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def _device(map_location: Any) -> torch.device:
    """Return where tensors go that are on the CPU: `map_location` as torch.load takes it."""
    if map_location is None:
        return torch.device("cpu")
    if isinstance(map_location, Mapping):
        return torch.device(map_location.get("cpu", "cpu"))
    if callable(map_location):
        empty = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
        return getattr(map_location(empty, "cpu"), "device", torch.device("cpu"))
    return torch.device(map_location)


def _moved(tensors: Mapping[str, Tensor], place: torch.device) -> dict[str, Tensor]:
    """Return the tensors on another device."""
    return {name: tensor.to(place) for name, tensor in tensors.items()}
