"""Read a checkpoint of a training run, or the newest complete one of a run's folder (`run`).

The weights in it lie in another format, which reads them; of a sharded run in shards, whose places the manifest says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import view
from tensorkeep.formats._cover import overlapping
from tensorkeep.storage import run_folder, run_manifest
from tensorkeep.storage.files import Folder, LocalFolder
from tensorkeep.storage.manifest_entries import ShardEntry
from tensorkeep.storage.record import Block, TensorRecord
from tensorkeep.storage.run_folder import ADAPTER, EMA, METADATA, MODEL, OPTIMIZER, OpenedCheckpoint
from tensorkeep.storage.run_manifest import Manifest

PartName = Literal["model", "adapter", "optimizer", "ema"]
_FILES: dict[PartName, str] = {"model": MODEL, "adapter": ADAPTER, "optimizer": OPTIMIZER, "ema": EMA}


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether the folder is a run, or a step folder of one."""
    return (
        not single and isinstance(folder, LocalFolder) and run_folder.find_checkpoint(folder.path.resolve()) is not None
    )


def read(folder: Folder, names: list[str], path: str) -> view.StateView:
    """Open the weights of a run's checkpoint.

    `metadata["run"]` is the position in the run, `metadata["over a base"]` whether the view holds what trains alone,
    beside a base stored elsewhere; its notes name newer steps that were passed over.

    Args:
        folder: the run's folder or a step folder.
        names: not used.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: with an F code where manifest, sizes or the weights' header are not whole.
    """
    assert isinstance(folder, LocalFolder)
    step = run_folder.open_checkpoint(folder.path)
    assert step is not None
    if METADATA in step.manifest.files:
        found = _joined(step, "model", path)
    else:
        found = view.recognised(LocalFolder(step.path), step.files, path, but="run")
    found.metadata["run"] = step.run
    found.metadata["over a base"] = step.manifest.base is not None
    found.notes += [view.Note(f.code, f"passed over: {f.message}", tuple(f.tensors)) for f in step.passed]
    return found


def read_part(path: str | Path, part: PartName) -> view.StateView | None:
    """Open one part of a run's checkpoint.

    Args:
        path: a step folder, or a run's folder.
        part: a whole model's weights, those that train beside a base stored elsewhere, the optimizer's state by
            `parameter/slot`, or the average.

    Returns:
        The part as a checkpoint of its own; None where the path is no run, or the checkpoint has no such part.

    Raises:
        TensorkeepError: as `read`.
    """
    step = run_folder.open_checkpoint(Path(path))
    if step is None:
        return None
    if _FILES[part] in step.manifest.files:
        return view.read(step.path / _FILES[part])
    return _joined(step, part, str(path)) if _in_shards(step.path, step.manifest, part) else None


def has_part(folder: Path, part: PartName) -> bool:
    """Tell whether a checkpoint of a run has a part, by its files and, where it lies in shards, its manifest.

    Args:
        folder: a step folder.
        part: as `read_part` takes it.

    Raises:
        TensorkeepError: with an F code where the manifest is damaged.
    """
    if (folder / _FILES[part]).is_file():
        return True
    return (folder / METADATA).is_file() and _in_shards(folder, run_manifest.read_manifest(folder), part)


def _in_shards(folder: Path, manifest: Manifest, part: PartName) -> bool:
    """Tell whether a part lies in shards; weights are an adapter's where there is a base."""
    if part in ("model", "adapter") and part != ("model" if manifest.base is None else "adapter"):
        return False
    stored = "model" if part == "adapter" else part
    lists = (run_manifest.shards_in(folder, file, manifest) for file in manifest.files)
    return any(_part_of(entry)[0] == stored for entries in lists for entry in entries)


def _part_of(entry: ShardEntry) -> tuple[str, str]:
    """Split a shard's name into part and name."""
    part, _, name = entry.tensor.partition(".")
    return part, name


def _joined(step: OpenedCheckpoint, part: PartName, path: str) -> view.StateView:
    """Join the shards of a part, wherever they lie."""
    shards: dict[str, list[tuple[str, ShardEntry]]] = {}
    for file in step.manifest.files:
        for entry in run_manifest.shards_in(step.path, file, step.manifest):
            kind, name = _part_of(entry)
            if kind == ("model" if part == "adapter" else part):
                shards.setdefault(name, []).append((file, entry))
    records = {name: _record(name, own, step.path) for name, own in shards.items()}
    return view.StateView(path, "dcp", LocalFolder(step.path), records)


def _record(name: str, shards: list[tuple[str, ShardEntry]], folder: Path) -> TensorRecord:
    """Turn the shards of a tensor into its record; they must cover it exactly."""
    first = shards[0][1]
    alike = all(e.dtype == first.dtype and len(e.shape) == len(first.shape) and e.offset is not None for _, e in shards)
    ends = [[o + n for o, n in zip(e.offset or (), e.shape)] for _, e in shards]
    shape = tuple(map(max, zip(*ends))) if alike else ()
    blocks = [Block(file, e.start, e.nbytes, e.offset or (), e.shape) for file, e in shards]
    if not alike or sum(math.prod(b.shape) for b in blocks) != math.prod(shape) or overlapping(blocks):
        raise TensorkeepError(
            f"{name}: its shards make no whole",
            where=folder,
            code="F07",
            hint="use the checkpoint before it",
            tensors=[name],
        )
    return TensorRecord(name, first.dtype, shape, tuple(blocks))
