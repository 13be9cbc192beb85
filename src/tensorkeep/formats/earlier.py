"""What `--overwrite` takes for an earlier checkpoint: what reads as one or bears our certificate, with its companions.

Nothing else in the folder may be there, since all of it would go: no file of another program, no subfolder, no run with
its other checkpoints and its optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tensorkeep.errors import TensorkeepError
from tensorkeep.formats.companions import COMPANIONS
from tensorkeep.formats.view import StateView, read
from tensorkeep.storage.certificate import parse_certificate
from tensorkeep.storage.files import CERTIFICATE, Folder, LocalFolder
from tensorkeep.storage.overwriting import Kind, listed

_ADAPTER_CONFIG = "adapter_config.json"
_STATEMENT = ("identity.json", "identity.sig")  # what the checkpoint was, which a new one there is not
_SAVES = ("zero", "ranks", "megatron")  # whole saves of other programs, with their optimizer
_LARGEST = 1 << 30  # bytes; a certificate of 200 000 tensors has 100 MB
# names that our own sinks give weights; unread ones are taken away only where a certificate lies beside them
_WEIGHTS = re.compile(
    r"(model|adapter_model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    r"|(model|adapter)\.(safetensors|pth)|[a-z_]+_\d+(_moe)?\.pth|\.metadata|__\d+_\d+\.distcp"
)


def strangers_in(folder: Folder, url: str, names: Sequence[str], ours: bool = False) -> list[str]:
    """Return the files of a folder that are no part of the checkpoint in it; all, where there is none.

    Args:
        folder: where the files lie, local or in a store.
        url: the folder as `read` takes it.
        names: every file below it, relative to it.
        ours: it is known that we were writing here, which may have left half of a checkpoint.
    """
    known: set[str] = set()
    view = _opened(url)
    if view is not None:
        known |= _files(view, names)
    elif ours or (CERTIFICATE in names and certified(folder, CERTIFICATE)):
        known |= {name for name in names if _WEIGHTS.fullmatch(name)}
    else:
        return list(names)
    return [name for name in names if name not in {*known, *COMPANIONS, CERTIFICATE, _ADAPTER_CONFIG, *_STATEMENT}]


def certified(folder: Folder, name: str) -> bool:
    """Tell whether a file is one of our certificates.

    Args:
        folder: where it lies.
        name: its name there.
    """
    try:
        return folder.size(name) <= _LARGEST and bool(parse_certificate(folder.read(name), name))
    except TensorkeepError:
        return False


def reads(url: str) -> bool:
    """Tell whether a file or folder reads as a checkpoint.

    Args:
        url: a path or URL, as `read` takes it.
    """
    return _opened(url) is not None


def _opened(url: str) -> StateView | None:
    """Open a checkpoint for its names; None where nothing reads, or it is a run, which no sink is."""
    try:
        view = read(url)
    except TensorkeepError:
        return None
    of_another = "run" in view.metadata or "home" in view.metadata or view.format in _SAVES
    return view if len(view) and not of_another else None


def _files(view: StateView, names: Sequence[str]) -> set[str]:
    """List the files that hold a checkpoint's tensors and say where they lie."""
    found = {block.file for record in view.values() for block in record.blocks}
    if view.format == "pth":  # anything is kept in such files, an optimizer or data: their names must say weights
        return {name for name in found if _WEIGHTS.fullmatch(name)}
    if view.format == "dcp":
        return found | {name for name in names if name == ".metadata" or ("/" not in name and name.endswith(".distcp"))}
    return found | {name for name in names if "/" not in name and name.endswith(".safetensors.index.json")}


def _strangers(path: Path) -> list[str]:
    """List what at a local path is no part of a checkpoint."""
    if path.is_dir():
        return strangers_in(LocalFolder(path), str(path.absolute()), listed(path))
    beside = f"{path.name}.{CERTIFICATE}"
    ours = (path.parent / beside).is_file() and certified(LocalFolder(path.parent), beside)
    known = path.is_file() and (path.stat().st_size == 0 or ours or reads(str(path.absolute())))
    return [] if known else [path.name]


def _no_certificate(path: Path) -> list[str]:
    known = path.is_file() and (path.stat().st_size == 0 or certified(LocalFolder(path.parent), path.name))
    return [] if known else listed(path) if path.is_dir() else [path.name]


CHECKPOINT = Kind("a checkpoint", _strangers)
LONE_CERTIFICATE = Kind("a certificate of tensorkeep", _no_certificate)
