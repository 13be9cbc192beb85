"""Open a folder whose weights lie in a folder below it, as training programs write them (`layouts` has the tables).

The weights are in another format, which reads them; `metadata["home"]` is the folder of the whole save, in which
optimizer, schedule and random state lie, and `metadata["taken"]` says which part was read.
"""

from __future__ import annotations

import re
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats import layouts, view
from tensorkeep.formats.companions import find_companions
from tensorkeep.formats.names import natural
from tensorkeep.storage.budget import read_small_from
from tensorkeep.storage.certificate import parse_json
from tensorkeep.storage.files import Folder, LocalFolder, explained

_DEEPEST = 5  # folders within one another: lightning_logs/version_0/checkpoints/x.ckpt/checkpoint
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|tar|gguf)(\.index\.json)?")


def sniff(folder: Folder, names: list[str], single: bool) -> bool:
    """Tell whether the weights lie in a folder below, and none in this one; `single`: the user named a file."""
    if single or not isinstance(folder, LocalFolder):
        return False
    if any(map(_weights, names)):
        return layouts.elsewhere(names) is not None and "pytorch_model.bin" not in names
    return _below(folder.path) is not None or layouts.elsewhere(_entries(folder.path)) is not None


def _weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None and not layouts.is_state(name)


def _entries(path: Path) -> list[str]:
    with explained(path):
        return [entry.name for entry in path.iterdir()]


def _below(path: Path) -> tuple[layouts.Place, Path, bool, int] | None:
    """Find the folder to go into, whether it is a save of its own, and how many there are to choose from."""
    with explained(path):
        if found := layouts.place_in(path, layouts.PLACES):
            return found[0], found[1], False, found[2]
        if found := layouts.place_in(path, layouts.STEPS):
            return found[0], found[1], True, found[2]
    inner = [e for e in path.iterdir() if e.is_dir() and e.name.endswith(".ckpt")]  # Lightning under FSDP, DeepSpeed
    if inner:
        last = next((e for e in inner if e.name == "last.ckpt"), None)
        return layouts.Place("", "Lightning"), last or max(inner, key=lambda e: natural(e.name)), True, len(inner)
    return None


def read(folder: Folder, names: list[str], path: str) -> view.StateView:
    """Open the weights in the folder below, or in one below that.

    Args:
        folder: the folder that the user named.
        names: the files in it.
        path: what the user typed, for messages.

    Raises:
        TensorkeepError: nothing in the folder below is recognised, or only another program can join it.
    """
    assert isinstance(folder, LocalFolder)
    at, home = folder, folder.path
    hops: list[str] = []
    notes: list[view.Note] = []
    writers: list[str] = []
    while sniff(at, at.names(), False):
        found = _below(at.path)
        if found is None or len(hops) == _DEEPEST:
            raise _closed(at, path, len(hops))
        place, below, own, count = found
        if own and count > 1:
            notes.append(view.Note("F08", f"{below.name} is read, of {count} such folders in {at.path.name}"))
        said = layouts.pointed(at.path, place)
        if said and layouts.named_by(said, place, [below]) is None:
            notes.append(view.Note("F08", f"{below.name} is read; {place.pointer} names {said[:60]!r}, not there"))
        hops.append(below.name)
        writers.append(place.writer)
        home = below if own else at.path
        at = LocalFolder(below)
    try:
        opened = view.recognised(at, at.names(), path, but="folder")
    except TensorkeepError as error:
        raise _inside(error, "/".join(hops), path) from None
    hops += [opened.metadata["taken"]] if "taken" in opened.metadata else []
    opened.notes += notes
    opened.metadata.update(taken="/".join(hops), writers=tuple(dict.fromkeys(writers)), home=home, named=folder.path)
    _describe(opened, [folder.path, home])
    return opened


def _closed(at: LocalFolder, path: str, hops: int) -> TensorkeepError:
    """Return the error for a folder that cannot be entered any further."""
    row = layouts.elsewhere(_entries(at.path))
    if row is not None:
        return joined_elsewhere(row, path)
    return TensorkeepError(
        f"holds folders within folders, {hops} deep, and no weights", where=path, code="F05", hint="name the folder"
    )


def _inside(error: TensorkeepError, name: str, path: str) -> TensorkeepError:
    """Return the error of a folder below, made to say which folder was tried."""
    if error.where is not None and f"/{name}" in error.where:
        return error
    what = f"in {name}: {error.what}"
    return TensorkeepError(what, where=error.where or path, hint=error.hint, code=error.code, tensors=error.tensors)


def _describe(opened: view.StateView, places: list[Path]) -> None:
    """Take config and tokenizer from where the program keeps them, and leave configs that are no model's."""
    inside = [opened.folder.path] if isinstance(opened.folder, LocalFolder) else []
    for place in [found for top in (*inside, *places) for found in (top, top / "huggingface")]:
        if any(c.name == "config.json" for c in opened.companions) or not (place / "config.json").is_file():
            continue
        config = parse_json(read_small_from(LocalFolder(place), "config.json"), f"{place}/config.json")
        if isinstance(config, dict) and ("model_type" in config or "architectures" in config):
            opened.companions += find_companions(LocalFolder(place), opened.companions, described=True)


def joined_elsewhere(row: layouts.Elsewhere, path: str) -> TensorkeepError:
    """Return the error for files that only another program can join.

    Args:
        row: what they are.
        path: what the user typed.
    """
    return TensorkeepError(f"holds {row.what}; they are not joined here", where=path, hint=row.tool)
