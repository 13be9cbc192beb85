"""Find the saves of a training in its folder, newest first, and tell from names whether their writer had finished.

A save is known by its name, by a file that its program writes last, or by a seal of ours. Nothing in it is opened here.

| table | a row says |
|---|---|
| `HOLDERS` | a folder in which a program keeps its saves, below the folder that people name |
| `LAST` | a file that a program writes when the rest of a save is there |
| `RANKS` | a file of which every process writes one, and its number |
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import layouts, seals
from tensorkeep.storage import run_manifest
from tensorkeep.storage.archive import saved_value, zip_entries
from tensorkeep.storage.files import LocalFolder, explained, local_path

HOLDERS = re.compile(r"checkpoints?|lightning_logs|version_\d+")
LAST = (
    ("trainer_state.json", "transformers' Trainer"),
    ("random_states_0.pkl", "accelerate"),
    (".metadata", "torch.distributed.checkpoint, torchtitan"),
    ("metadata.pkl", "torch_checkpointing"),
    ("meta.pt", "Lightning under FSDP"),
    ("latest", "DeepSpeed"),
    ("model.safetensors.index.json", "torchtitan's last save, as safetensors"),
)
CONTENT = {name for name, _ in LAST[:5]}  # by these a save of any name is known
# of the last column the highest number is that of every process; the rest may be those of a part of them
RANKS = (
    (r"rng_state_(\d+)\.pth", True),
    (r"random_states_(\d+)\.pkl", True),
    (r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_(?:model|optim)_states\.pt", False),
    (r"(?:model|optim|extra_state)_world_size_\d+_rank_(\d+)\.pt", False),
    (r"__(\d+)_\d+\.distcp", None),  # a process with nothing to write writes none
)
_NUMBER = re.compile(r".*?step=(\d+).*|.*?(\d+)\D*")
_MINUTE = 60 * 10**9  # nanoseconds; clocks of hosts differ, and copies have times of their own
_DEEPEST = 4  # lightning_logs/version_0/checkpoints/x.ckpt


class Save(NamedTuple):
    """One save of a training.

    Attributes:
        path: the folder, or the lone file.
        number: the step in its name; None where it has none.
    """

    path: Path
    number: int | None


def step_in(name: str) -> int | None:
    """Return the step in the name of a save, None where there is none.

    Args:
        name: the name, without its path.

    Example:
        >>> step_in("checkpoint-500"), step_in("epoch=3-step=40.ckpt"), step_in("last.ckpt")
        (500, 40, None)
    """
    match = _NUMBER.fullmatch(name.removesuffix("-unsharded"))
    return int((match[1] or match[2])[:18]) if match else None


def saves_in(folder: str | Path) -> list[Save]:
    """List the saves of a training, newest first: by step, Lightning's versions first by their number.

    Args:
        folder: the folder that a program writes its saves into, or one above it; or a save itself.

    Returns:
        The saves, whole or not; [] where there are none.
    """
    path = local_path(folder)
    if _is_save(path):
        return [_found(path)]
    found = _below(path, _DEEPEST)
    found = [save for save in found if save.path.suffix == ".ckpt" or _named(save.path)] or found
    return sorted(found, key=_age, reverse=True)


def step_at(save: Path) -> int:
    """Return the step that a save is of: what Lightning wrote into it, else the number in its name, else 0.

    Args:
        save: a folder, or a lone file; it is whole.
    """
    file = save if save.is_file() else save / "meta.pt"
    if save.suffix == ".ckpt" and file.is_file():
        folder = LocalFolder(file.parent)
        with contextlib.suppress(TensorkeepError):
            held = saved_value(folder, file.name, zip_entries(folder, file.name, 0, folder.size(file.name)))
            step = held.get("global_step") if isinstance(held, dict) else None
            if type(step) is int and 0 <= step < 1 << 62:
                return step
    return step_in(save.name) or 0


def _found(path: Path) -> Save:
    """Make the entry of a save; the step of a `.ckpt` is its seal's, since `last.ckpt` has none in its name."""
    if path.suffix == ".ckpt" and seals.is_sealed(path):
        place = seals.seal_of(path)
        with contextlib.suppress(TensorkeepError):
            return Save(path, run_manifest.read_manifest(place.parent, place.name).step)
    return Save(path, step_in(path.name))


def _age(save: Save) -> tuple[int, int, bool, str]:
    """Order saves: by Lightning's version, the step, and of the same step `last.ckpt` first."""
    version = max((int(m[1][:18]) for p in save.path.parts if (m := re.fullmatch(r"version_(\d+)", p))), default=0)
    return version, -1 if save.number is None else save.number, save.path.name.startswith("last"), str(save.path)


def _below(path: Path, depth: int) -> list[Save]:
    """List the saves directly in a folder, and in those of its folders in which programs keep saves."""
    found: list[Save] = []
    with explained(path):
        entries = sorted(path.iterdir()) if path.is_dir() else []
    for entry in entries:
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if _is_save(entry):
            found.append(_found(entry))
        elif depth and entry.is_dir() and HOLDERS.fullmatch(entry.name):
            found += _below(entry, depth - 1)
    return found


def _is_save(path: Path) -> bool:
    """Tell whether a path is a save, finished or not; a folder of saves is none, whatever lies beside them."""
    if path.is_file():
        return path.suffix == ".ckpt"
    if not path.is_dir():
        return False
    if path.suffix == ".ckpt" or _named(path):
        return True
    below = list(path.iterdir())
    if any(entry.is_dir() and (_named(entry) or HOLDERS.fullmatch(entry.name)) for entry in below):
        return False
    return seals.is_sealed(path) or any(entry.name in CONTENT for entry in below)


def _named(path: Path) -> bool:
    """Tell whether the name alone is that of a program's save."""
    return not HOLDERS.fullmatch(path.name) and any(re.fullmatch(r.name, path.name) for r in (*layouts.STEPS, *_ZERO))


_ZERO = [row for row in layouts.PLACES if row.name.startswith("global_step")]


# -- had its writer finished? ---------------------------------------------------------------------------------------


def unfinished(save: Path, vouched: bool = False) -> str | None:
    """Say what shows, by names alone, that the writer of a save has not finished, or that a part was lost.

    Args:
        save: a folder, or a lone file.
        vouched: the user says that it is finished: no file need be there that programs write last.

    Returns:
        The reason in words; None where nothing shows.
    """
    if save.is_file():
        return None
    names = seals.files_in(save)
    top = {name for name in names if "/" not in name}
    if not vouched and not top & {name for name, _ in LAST} and not _known_otherwise(save, names):
        wanted = ", ".join(name for name, _ in LAST[:4])
        return f"none of the files that programs write last is there ({wanted}, ...)"
    if not vouched and (newer := _written_again(save, names, top)) is not None:
        return f"{newer} is newer than what its program writes last: it is being written again"
    for inner in {str(Path(n).parent) for n in names if n.endswith(".distcp")}:
        if not (save / inner / ".metadata").is_file():
            return f"{inner}/.metadata is missing, which is written when every process is done"
    return _missing_ranks(names)


def _written_again(save: Path, names: list[str], top: set[str]) -> str | None:
    """Name a file of weights that is more than a minute newer than what is written last, for all that is there."""
    with explained(save):
        last = max((_changed(save / name) for name, _ in LAST if name in top), default=None)
        weights = [n for n in names if n.endswith((".distcp", ".safetensors", ".metadata"))]
        return next((n for n in weights if last is not None and _changed(save / n) > last + _MINUTE), None)


def _changed(path: Path) -> int:
    return path.lstat().st_mtime_ns


def _known_otherwise(save: Path, names: list[str]) -> bool:
    """Tell whether a save is of a program that writes no file last: its ranks are counted, its files opened."""
    zero = any(re.fullmatch(row.name, save.name) for row in _ZERO)
    return zero or save.suffix == ".ckpt" or any(re.fullmatch(RANKS[3][0], Path(n).name) for n in names)


def _missing_ranks(names: list[str]) -> str | None:
    """Say which process's file is missing among those of which each process writes one."""
    families: dict[str, tuple[set[int], bool | None]] = defaultdict(lambda: (set(), None))
    for name in names:
        for pattern, every in RANKS:
            if match := re.fullmatch(pattern, Path(name).name):
                start = len(name) - len(match[0])
                shown = f"{name[: start + match.start(1)]}*{name[start + match.end(1) :]}"
                key = "*.distcp" if every is None else shown
                families[key] = (families[key][0] | {int(match[1])}, every)
    highest = max((max(ranks) for ranks, _ in families.values()), default=0)
    for shown, (ranks, every) in families.items():
        if every is None:
            continue
        last = highest if every else max(ranks)
        if missing := [rank for rank in range(min(ranks), last + 1) if rank not in ranks]:
            first = ", ".join(shown.replace("*", str(rank), 1) for rank in missing[:3])
            return f"{first} missing: {last + 1 - min(ranks)} processes wrote it"
    return None
